"""The pictures of one subset on their way to become samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from library.config.dataset import DatasetConfig, SubsetConfig
from library.data.findings import Findings, Skipped
from library.data.folders import Folder, stem_of
from library.io.places import FileEntry


@dataclass
class Listing:
    """The pictures of one subset. There may be very many: per picture it holds nothing but its file.

    Attributes:
        number: Index of the dataset in the configuration.
        position: Index of the subset in its dataset.
        dataset: The dataset.
        subset: The subset.
        home: The folder that its pictures are in; None: it has none, or can't be listed.
        pictures: Its pictures. Their names are those of the samples' keys: the place below ``image_dir``.
        elsewhere: Path -> folder of the pictures that aren't in ``home``, but where a metadata file says.
        captions: The caption lines of each, where a metadata file was read; empty where that gives none.
    """

    number: int
    position: int
    dataset: DatasetConfig
    subset: SubsetConfig
    home: Folder | None = None
    pictures: list[FileEntry] = field(default_factory=list)
    elsewhere: dict[str, Folder] = field(default_factory=dict)
    captions: list[tuple[str, ...]] | None = None

    @property
    def wants_faces(self) -> bool:
        """Whether its crops go around faces."""
        return self.subset.needs_faces or self.dataset.crop_style == "face"

    def stems(self) -> list[str]:
        """The stem of each picture in the folder where it is; its caption file and its mask have the same."""
        if self.home is not None and self.pictures is self.home.pictures:
            return self.home.stems
        stems = [stem_of(picture.name) for picture in self.pictures]
        if self.elsewhere:
            for row, picture in enumerate(self.pictures):
                if picture.path in self.elsewhere:
                    stems[row] = stems[row].rpartition("/")[2]
        return stems

    def keep(self, wanted: Sequence[bool]) -> None:
        """This drops the pictures that aren't wanted."""
        if not all(wanted):
            self.pictures = [picture for picture, keep in zip(self.pictures, wanted) if keep]
            if self.captions is not None:
                self.captions = [lines for lines, keep in zip(self.captions, wanted) if keep]

    def skip(self, path: str, reason: str, findings: Findings) -> None:
        """This reports that a picture is left out."""
        findings.skipped.append(Skipped(path, self.number, self.position, reason))
