"""The sizes that a picture is computed at, where a model computes at the sizes that it was trained with alone."""

from library.data.bucket_tables import table_resolutions
from library.records import Resolution


def nearest_in_table(table: str, size: Resolution) -> Resolution:
    """The entry of a published table whose shape is nearest to that of a picture.

    As published: an entry stands for its height divided by its width, rounded to hundredths.

    Args:
        table: One of ``library.config.pictures.BUCKET_TABLES``.
        size: The picture's.
    """

    def ratio(entry: Resolution) -> float:
        return round(entry.height / entry.width, 2)

    entries = sorted(table_resolutions(table), key=ratio)
    return min(entries, key=lambda entry: abs(ratio(entry) - size.height / size.width))
