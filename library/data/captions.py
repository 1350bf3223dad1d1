"""What a caption becomes at one visit of its picture: a pure function of the caption, the settings and a seed.

Each stage draws from a generator of its own, so switching one stage on or off changes no other stage's draws.
"""

import itertools
import math
import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from library.config.dataset import SubsetConfig
from library.randomness import python_random

_WILDCARD = re.compile(r"(?P<open>\{\{)|(?P<close>\}\})|\{(?P<choices>(?:[^{}]|\{\{[^{}]*\}\})+)\}")
_JOINED = ", "
_MOST_POSSIBLE = 10_000
_MOST_CHARACTERS = 50_000_000
"""Of all that is listed of one line; of a usual one these are more than ten thousand."""

_AFTER_WARM_UP = sys.maxsize


def caption_for_visit(
    captions: Sequence[str],
    subset: SubsetConfig,
    rng: random.Random,
    *,
    epoch: int,
    step: int,
    max_steps: int,
    variants: int | None = None,
    visit: int = 0,
) -> tuple[str, bool]:
    """This makes the caption of one visit.

    Args:
        captions: The lines of the caption file that may be used.
        subset: What to do with them.
        rng: Decides everything that is random; seeded by the sample and its visit.
        epoch: Counted from 0; ``caption_dropout_every_n_epochs`` counts the first one as 1, as people do.
        step: Optimizer step, counted from 0; for the warm-up of tags.
        max_steps: Optimizer steps of the run; for a warm-up that is given as a fraction of them.
        variants: How many versions of each caption there are, as ``caption_versions`` lists them: the visits take them
            in turn, and ``rng`` decides dropout alone. None: each visit makes its own.
        visit: Which use of the sample it is; it chooses among the versions.

    Returns:
        The caption, and whether dropout struck: then the caption is empty.
    """
    stages = _Stages.of(rng)
    every = subset.caption_dropout_every_n_epochs
    if (every > 0 and (epoch + 1) % every == 0) or random.Random(stages.dropout).random() < subset.caption_dropout_rate:
        return "", True
    if variants is not None:
        return _version(captions, subset, visit % variants), False
    return _made(captions, subset, stages, step, max_steps), False


def caption_versions(captions: Sequence[str], subset: SubsetConfig, variants: int | None) -> tuple[str, ...]:
    """This lists the captions that visits can have, each once and in a stable order; dropout's empty one apart.

    Args:
        captions: The lines of the caption file that may be used.
        subset: What to do with them.
        variants: As for ``caption_for_visit``: the captions are those of its versions. None: every line with every
            choice of its wildcards, of very many the first ones.

    Raises:
        ValueError: Tags are shuffled or left out at random, and there are no variants: nobody can list those captions.
    """
    if variants is not None and _is_random(captions, subset):
        return tuple(dict.fromkeys(_version(captions, subset, number) for number in range(variants)))
    if _changes_tags(subset):
        raise ValueError("captions whose tags change at every visit can't be listed without a number of variants")
    possible = itertools.islice(_possible(captions, subset), _MOST_POSSIBLE)
    return tuple(dict.fromkeys(_tags_in_order(caption, subset) for caption in possible))


class _Stages(NamedTuple):
    """A seed for each thing that is left to chance."""

    dropout: int
    line: int
    wildcard: int
    shuffle: int
    tag_dropout: int

    @classmethod
    def of(cls, rng: random.Random) -> "_Stages":
        return cls(*(rng.getrandbits(64) for _ in cls._fields))


def _version(captions: Sequence[str], subset: SubsetConfig, number: int) -> str:
    # Of the caption alone, not of run or picture: other runs find it, and more variants keep the ones there are.
    stages = _Stages.of(python_random("caption variant", *captions, number))
    return _made(captions, subset, stages, step=_AFTER_WARM_UP, max_steps=0)


def _made(captions: Sequence[str], subset: SubsetConfig, stages: _Stages, step: int, max_steps: int) -> str:
    """The caption without dropout."""
    if not subset.enable_wildcard:
        caption = _surrounded(captions[0], subset)
    else:
        caption = _surrounded(random.Random(stages.line).choice(captions), subset)
        wildcard = random.Random(stages.wildcard)
        caption = _WILDCARD.sub(lambda match: wildcard.choice(_choices(match)), caption)
    if not _changes_tags(subset):
        return _tags_in_order(caption, subset)
    head, tags, tail = _split(caption, subset)
    tags = tags[: _tags_in_use(len(tags), subset, step, max_steps)]
    if subset.shuffle_caption:
        random.Random(stages.shuffle).shuffle(tags)
    if subset.caption_tag_dropout_rate > 0:
        dropout = random.Random(stages.tag_dropout)
        tags = [tag for tag in tags if dropout.random() >= subset.caption_tag_dropout_rate]
    return _with_secondary(_JOINED.join(head + tags + tail), subset)


def _is_random(captions: Sequence[str], subset: SubsetConfig) -> bool:
    return _changes_tags(subset) or len(list(itertools.islice(_possible(captions, subset), 2))) > 1


def _possible(captions: Sequence[str], subset: SubsetConfig) -> Iterator[str]:
    """The caption; with wildcards on, every line with every choice of them."""
    if not subset.enable_wildcard:
        yield _surrounded(captions[0], subset)
        return
    for line in captions:
        pieces = list(_pieces(_surrounded(line, subset)))
        most = max(1, _MOST_CHARACTERS // sum(len(one[0]) + 1 for one in pieces))
        for chosen in itertools.islice(itertools.product(*pieces), most):
            yield "".join(chosen)


def _pieces(caption: str) -> Iterator[Sequence[str]]:
    """The caption in parts, each with its alternatives."""
    end = 0
    for match in _WILDCARD.finditer(caption):
        yield (caption[end : match.start()],)
        yield _choices(match)
        end = match.end()
    yield (caption[end:],)


def _choices(match: re.Match[str]) -> Sequence[str]:
    if match["choices"] is None:
        return ("{",) if match["open"] else ("}",)
    return [choice.replace("{{", "{").replace("}}", "}") for choice in match["choices"].split("|")]


def _surrounded(caption: str, subset: SubsetConfig) -> str:
    if subset.caption_prefix:
        caption = f"{subset.caption_prefix} {caption}"
    return f"{caption} {subset.caption_suffix}" if subset.caption_suffix else caption


def _tags_in_order(caption: str, subset: SubsetConfig) -> str:
    """The caption as it is where nothing happens to its tags; marks are taken out all the same."""
    if _is_marked(caption, subset):
        head, tags, tail = _split(caption, subset)
        caption = _JOINED.join(head + tags + tail)
    return _with_secondary(caption, subset)


def _changes_tags(subset: SubsetConfig) -> bool:
    return subset.shuffle_caption or subset.token_warmup_step > 0 or subset.caption_tag_dropout_rate > 0


def _is_marked(caption: str, subset: SubsetConfig) -> bool:
    return bool(subset.keep_tokens_separator) and subset.keep_tokens_separator in caption


def _split(caption: str, subset: SubsetConfig) -> tuple[list[str], list[str], list[str]]:
    """The tags: fixed at the start, free, fixed at the end."""
    if _is_marked(caption, subset):
        head, tags, *tail = caption.split(subset.keep_tokens_separator)
        return _tags(head, subset), _tags(tags, subset), [tag for part in tail for tag in _tags(part, subset)]
    tags_of_all = _tags(caption, subset)
    return tags_of_all[: subset.keep_tokens], tags_of_all[subset.keep_tokens :], []


def _tags(text: str, subset: SubsetConfig) -> list[str]:
    parts = text.split(subset.caption_separator) if subset.caption_separator else [text]
    return [tag for part in parts if (tag := part.strip())]


def _tags_in_use(count: int, subset: SubsetConfig, step: int, max_steps: int) -> int:
    """How many of ``count`` free tags the warm-up lets through."""
    warmup = subset.token_warmup_step
    if warmup < 1:
        warmup = math.floor(warmup * max_steps)
    if step >= warmup or count <= subset.token_warmup_min:
        return count
    return math.floor(step * (count - subset.token_warmup_min) / warmup) + subset.token_warmup_min


def _with_secondary(caption: str, subset: SubsetConfig) -> str:
    if not subset.secondary_separator:
        return caption
    return caption.replace(subset.secondary_separator, subset.caption_separator)
