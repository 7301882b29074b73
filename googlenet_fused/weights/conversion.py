"""What a file of weights holds and where it comes from, to be said in a described file of the same weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from googlenet_fused.preparation import PREPARATIONS
from googlenet_fused.spec import GOOGLENET_SPECS
from googlenet_fused.weights.description import Description, read_description
from googlenet_fused.weights.download import fetch, published_with, sha256_of
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.files import read_with_variant
from googlenet_fused.weights.load import AUX_HEADS, Source, resolve, variant_of
from googlenet_fused.weights.published import PublishedWeights


@dataclass(frozen=True)
class Contents:
    """What a file of weights holds.

    Attributes:
        variant: which GoogLeNet the weights are for.
        num_classes: width of its classifier.
        aux_logits: whether the auxiliary heads are there.
        published: the published weights that the very file is, told by its SHA-256.
        description: what the file says of itself.
        sha256: the file's digest, in hexadecimal.
    """

    variant: str
    num_classes: int
    aux_logits: bool
    published: PublishedWeights | None
    description: Description | None
    sha256: str


def examine(path: str | os.PathLike[str], variant: str | None = None) -> Contents:
    """What the file holds. The variant is what the file says of itself, else that of the published weights that it is, else
    the one whose own names are in it (Caffe's, TF-slim's), else ``variant``, else the one that its keys belong to.

    Raises:
        WeightsError: the file cannot be read (see ``read_state_dict``), is no GoogLeNet, is known to be for another variant, or
            says of itself another number of classes than its classifier has.
        ImportError: as ``read_state_dict`` raises it.
    """
    path = Path(path).expanduser()
    tensors, named = read_with_variant(path)
    digest = sha256_of(path)
    description, published = read_description(path), published_with(digest)
    known = description.variant if description else published.variant if published else named
    if None not in (variant, known) and variant != known:
        raise WeightsError(f"{path} is for the {known!r} variant, not for {variant!r}: leave the variant out, or say {known!r}")
    found = known or variant or variant_of(tensors)
    classifier = tensors.get("fc.weight")
    if found is None or classifier is None:
        raise WeightsError(f"{path} is no GoogLeNet: it lacks conv1.conv.weight, its companions, or a classifier fc.weight")
    num_classes = _width(path, classifier)
    if description is not None and description.num_classes != num_classes:
        raise WeightsError(
            f"{path} says that it has {description.num_classes} classes, and its classifier has {num_classes}; write it anew"
        )
    heads = any(key.startswith(AUX_HEADS) for key in tensors)
    return Contents(found, num_classes, heads, published, description, digest)


def _width(path: Path, classifier: Tensor) -> int:
    """How many classes, each with values of its own in the file: a network is built of that width before anything is loaded."""
    features = GOOGLENET_SPECS["5b"].out_channels
    if classifier.dim() != 2 or classifier.shape[1] != features or not len(classifier):
        raise WeightsError(
            f"{path} is no GoogLeNet: its fc.weight has shape {list(classifier.shape)}, not [classes, {features}]"
        )
    if classifier.numel() * classifier.itemsize > classifier.untyped_storage().nbytes():
        raise WeightsError(f"{path} holds fewer values than its fc.weight of shape {list(classifier.shape)} needs: save a copy")
    return len(classifier)


def understand(
    source: Source, variant: str | None = None, *, transform_input: bool = False
) -> tuple[Path, Contents, Description]:
    """The file of weights, what it holds, and what it says of itself or else what has to be assumed: 224x224 out of 256.

    Args:
        source: as ``load_weights`` takes it.
        variant: which GoogLeNet the weights are for; None takes what the file says, or its names or keys tell.
        transform_input: whether the weights expect input in [-1, 1]; it is known of files that say so.

    Raises:
        WeightsError: as ``examine`` raises it; or the weights cannot be had, what the file says of itself cannot be, or it
            contradicts ``transform_input``.
        ImportError: as ``read_state_dict`` raises it.
    """
    found = resolve(source, "source", variant)
    path = found if isinstance(found, Path) else fetch(found)
    contents = examine(path, variant)
    said = contents.description or Description(contents.variant, contents.num_classes, transform_input=transform_input)
    if said.variant not in PREPARATIONS:
        raise WeightsError(f"{path} is for the variant {said.variant!r}, which is none of {', '.join(PREPARATIONS)}")
    if said.variant != "torchvision" and (transform_input or said.transform_input):
        raise WeightsError(
            f"{path} is for the {said.variant!r} variant, and transform_input belongs to 'torchvision': leave it out"
        )
    if transform_input and not said.transform_input:
        raise WeightsError(f"{path} says itself that its weights do not expect input in [-1, 1]: leave transform_input out")
    if said.resize < said.crop:
        raise WeightsError(f"{path}: its resize must be at least its crop ({said.crop}), got {said.resize}")
    return path, contents, said


def describe(path: str | os.PathLike[str], contents: Contents, transform_input: bool) -> Description:
    """The description of the weights in another file, which names this one and its SHA-256 as their source.

    Names of classes are those of the file's own description or of the published weights, the latter if torchvision is there.
    """
    own, published = contents.description, contents.published
    source = f"{Path(path).name}, SHA-256 {contents.sha256}"
    if published is not None:
        source += f", which is {published} from {published.url}"
    elif own is not None and own.source:
        source += f", made from {own.source}"
    if own is not None:
        classes, resize, crop = own.classes, own.resize, own.crop
    else:
        classes, resize, crop = _categories(published), Description.resize, Description.crop
    return Description(contents.variant, contents.num_classes, classes, transform_input, resize, crop, source)


def _categories(published: PublishedWeights | None) -> tuple[str, ...] | None:
    if published is None:
        return None
    try:
        return tuple(published.meta["categories"])
    except ImportError:
        return None
