"""Loading weights into a model: everything is checked first, so a model is loaded whole or left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from googlenet_fused.messages import listed
from googlenet_fused.weights.description import read_description
from googlenet_fused.weights.download import fetch, published_as
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.files import SUFFIXES, read_with_variant
from googlenet_fused.weights.published import PUBLISHED, GoogLeNet_Weights, PublishedWeights, Weights

Source = str | os.PathLike[str] | PublishedWeights | Weights
"""What weights may be given as: a file, published weights or their name, or ``Weights`` of your own."""

AUX_HEADS = ("aux1.", "aux2.")
_CLASSIFIERS = ("fc.", "aux1.fc2.", "aux2.fc2.")
_COUNTER = "num_batches_tracked"


class LoadedWeights(NamedTuple):
    """What ``load_weights`` did: the file, the published weights it was recognised as, and the keys that had no counterpart."""

    path: Path
    published: PublishedWeights | None
    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = True,
    allow_nonfinite: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LoadedWeights:
    """Loads a file or published weights into ``model``, in place; values are converted to the model's dtypes and devices.

    torchvision's published weights expect inputs in [-1, 1], so a model with an attribute ``transform_input`` always gets it
    set to ``True``, as torchvision does when weights are given; their file given as a local path is recognised by its SHA-256
    and treated alike. A ``.safetensors`` file with a ``Description`` says itself what the attribute is to be. Every other file
    leaves it as it is.

    Two differences are normal and pass: auxiliary heads in the file when the model has none, and ``num_batches_tracked`` on one
    side only (files from before torch 0.4.1 lack it; inference does not use it).

    Args:
        model: the model to load; untouched if anything is wrong.
        source: a file as ``read_state_dict`` takes it, a member of ``GoogLeNet_Weights`` or ``BVLC_GoogLeNet_Weights``, or its
            name in any case, which stands for the weights of the model's own variant, or a ``Weights``.
        strict: refuse missing and unexpected keys. Shapes and dtypes must fit in any case.
        allow_nonfinite: accept NaN and infinite values.
        cache_dir: where published weights are kept (see ``fetch``).
        progress: show a progress bar while downloading.

    Raises:
        WeightsError: the weights cannot be had or read, are published or described as those of another variant, or do not fit:
            the first wrong key in the model's order is named, with both shapes.
        TypeError: ``source`` is something else.
    """
    targets = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    variant = _variant_of_model(model, targets)
    found = resolve(source, "source", variant)
    if not isinstance(found, Path):
        name = found.filename if isinstance(found, Weights) else str(found)
        _check_variant(name, "is", found.variant, variant)
    path = found if isinstance(found, Path) else fetch(found, cache_dir, progress)
    tensors, named = read_with_variant(path)
    description = read_description(path)
    if named is not None:
        _check_variant(f"{path}, by the names in it,", "is", named, variant)
    if description is not None:
        _check_variant(str(path), "says that it is", description.variant, variant)
        if description.transform_input and description.variant != "torchvision":
            raise WeightsError(
                f"{path} says that its weights want transform_input, which belongs to the 'torchvision' variant, "
                f"and that they are for {description.variant!r}: write it again"
            )
    missing = [key for key in targets if key not in tensors]
    unexpected = [key for key in tensors if key not in targets]
    wrong = {}
    for key, target in targets.items():
        optional = not strict or key.endswith(_COUNTER)
        if fault := _fault(tensors.get(key), target, optional=optional, allow_nonfinite=allow_nonfinite):
            wrong[key] = fault
    has_heads = any(key.startswith(AUX_HEADS) for key in targets)
    surplus = [key for key in unexpected if not (key.endswith(_COUNTER) or (key.startswith(AUX_HEADS) and not has_heads))]
    if wrong or (strict and surplus):
        raise WeightsError(_describe(path, model, wrong, surplus if strict else [], tensors, targets))
    if not any(key in tensors for key in targets):
        raise WeightsError(f"{path} does not fit the model ({type(model).__name__}): they have no key in common")

    published = published_as(path)
    if published is not None:
        _check_variant(f"{path}, which is {published},", "is", published.variant, variant)
    model.load_state_dict({key: tensors[key] for key in targets if key in tensors}, strict=False)
    if hasattr(model, "transform_input"):
        if isinstance(published, GoogLeNet_Weights):
            model.transform_input = True  # type: ignore[assignment]
        elif description is not None:
            model.transform_input = description.transform_input  # type: ignore[assignment]
    return LoadedWeights(path, published, missing, unexpected)


def resolve(source: Source, argument: str, variant: str | None = None) -> Path | PublishedWeights | Weights:
    """What ``source`` stands for; nothing is read or downloaded.

    Args:
        argument: what the caller's signature calls it.
        variant: whose published weights a name stands for; None is torchvision's.

    Raises:
        WeightsError: a string is neither a file nor the name of published weights, or there are none for the variant.
        TypeError: ``source`` is something else.
    """
    if isinstance(source, str):
        members = PUBLISHED.get(variant or "torchvision")
        names = sorted(members.__members__) if members else []
        if members and source.upper() in names:
            return members[source.upper()]
        path = Path(source).expanduser()
        if path.suffix.lower() in SUFFIXES or path.exists():
            return path
        if not members and any(source.upper() in others.__members__ for others in PUBLISHED.values()):
            raise WeightsError(f"no weights are published for the {variant!r} variant: give a {listed(SUFFIXES, 'or')} file")
        known = (
            listed([f"a {', '.join(SUFFIXES)} file", *map(repr, names)], "or") if names else f"a {listed(SUFFIXES, 'or')} file"
        )
        raise WeightsError(f"{source}: there is no such file, and no published weights of that name: give {known}")
    if isinstance(source, PublishedWeights | Weights):
        return source
    if isinstance(source, os.PathLike):
        return Path(source).expanduser()
    kind = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
    got = f"{source!r} ({kind})" if isinstance(source, int | float | Enum) else kind
    names = " or ".join(f"googlenet_fused.{members.__name__}" for members in PUBLISHED.values())
    raise TypeError(f"{argument} must be a path, a member of {names} or its name, got {got}")


def variant_of(keys: Iterable[str]) -> str | None:
    """Which variant of GoogLeNet a state_dict comes from, by the first convolution's companions; None if it is none."""
    keys = set(keys)
    if "conv1.conv.weight" not in keys:
        return None
    if "conv1.bn.running_mean" in keys:
        return "torchvision"
    return "bvlc" if "conv1.conv.bias" in keys else None


def _variant_of_model(model: nn.Module, targets: Mapping[str, Tensor]) -> str | None:
    """As the model says itself, if it is a GoogLeNet: keys cannot tell all of them apart."""
    said, found = getattr(model, "variant", None), variant_of(targets)
    return said if found is not None and isinstance(said, str) else found


def _check_variant(what: str, verb: str, held: str | None, built: str | None) -> None:
    if held is not None and built is not None and held != built:
        raise WeightsError(
            f"{what} {verb} for the {held!r} variant, and the model is the {built!r} variant: build a {held!r} model"
        )


def _fault(value: Tensor | None, target: Tensor, *, optional: bool, allow_nonfinite: bool) -> str | None:
    """What is wrong with the file's value for one key of the model, or ``None``."""
    if target.is_meta:
        return "is on the meta device in the model, which keeps no values: call model.to_empty(device=...) first"
    if value is None:
        return None if optional else "is missing in the file"
    if value.shape != target.shape:
        return f"has shape {list(value.shape)} in the file and {list(target.shape)} in the model"
    if (value.is_floating_point(), value.is_complex()) != (target.is_floating_point(), target.is_complex()):
        return f"has dtype {value.dtype} in the file and {target.dtype} in the model"
    if not allow_nonfinite and target.is_floating_point():
        bad = value.numel() - int(value.to(target.dtype).isfinite().sum())
        if bad:
            return f"holds {_count(bad, 'NaN or infinite value')} as {target.dtype} (allow_nonfinite=True accepts that)"
    return None


def _describe(
    path: Path,
    model: nn.Module,
    wrong: Mapping[str, str],
    surplus: list[str],
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
) -> str:
    key, fault = next(iter(wrong.items())) if wrong else (surplus[0], "is in the file and not in the model")
    total = "no other key is wrong"
    if len(wrong) + len(surplus) > 1:
        counts = [(wrong, "of the model", "not fitting"), (surplus, "of the file", "not in the model")]
        total = "in all " + ", ".join(f"{_count(len(keys), 'key')} {whose} {what}" for keys, whose, what in counts if keys)
    extra = f" (first: {surplus[0]})" if surplus and wrong else ""
    hint = _hint(model, wrong, tensors, targets)
    return f"{path} does not fit the model ({type(model).__name__}): {key} {fault}; {total}{extra}{hint}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _hint(model: nn.Module, wrong: Mapping[str, str], tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> str:
    """The likely cause in words, where the keys give it away."""
    held, built = variant_of(tensors), _variant_of_model(model, targets)
    if held and built and held != variant_of(targets):
        return f". The file holds the {held!r} variant ({_TRAITS[held]}), the model is the {built!r} variant ({_TRAITS[built]})"
    if wrong and all(key.startswith(AUX_HEADS) and key not in tensors for key in wrong):
        return ". The file has no auxiliary heads: build the model with aux_logits=False"
    if "fc.bias" in tensors and "fc.bias" in wrong and all(key.startswith(_CLASSIFIERS) for key in wrong):
        classes = tensors["fc.bias"].numel()
        return f". The file's classifier has {_count(classes, 'output')}: build the model with num_classes={classes}"
    return ""


_BATCH_NORM = "batch norm, no convolution bias"
_TRAITS = {"torchvision": _BATCH_NORM, "slim": _BATCH_NORM, "bvlc": "convolution biases, no batch norm"}
