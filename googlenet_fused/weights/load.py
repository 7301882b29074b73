"""Loading weights into a model: everything is checked first, so a model is loaded whole or left as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from googlenet_fused.weights.download import fetch, published_as
from googlenet_fused.weights.errors import WeightsError
from googlenet_fused.weights.files import SAFETENSORS_SUFFIX, TORCH_SUFFIXES, read_state_dict
from googlenet_fused.weights.npz import SUFFIX as NPZ_SUFFIX
from googlenet_fused.weights.published import GoogLeNet_Weights, Weights

_AUX_HEADS = ("aux1.", "aux2.")
_CLASSIFIERS = ("fc.", "aux1.fc2.", "aux2.fc2.")
_COUNTER = "num_batches_tracked"


class LoadedWeights(NamedTuple):
    """What ``load_weights`` did: the file, the published weights it was recognised as, and the keys that had no counterpart."""

    path: Path
    published: GoogLeNet_Weights | None
    missing_keys: list[str]
    unexpected_keys: list[str]


def load_weights(
    model: nn.Module,
    source: str | os.PathLike[str] | GoogLeNet_Weights | Weights,
    *,
    strict: bool = True,
    allow_nonfinite: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LoadedWeights:
    """Loads a file or published weights into ``model``, in place; values are converted to the model's dtypes and devices.

    Published weights expect inputs in [-1, 1], so a model with an attribute ``transform_input`` always gets it set to ``True``,
    as torchvision does when weights are given; their file given as a local path is recognised by its SHA-256 and treated alike.
    Every other file leaves the attribute as it is, a conversion of the published weights to another format included.

    Two differences are normal and pass: auxiliary heads in the file when the model has none, and ``num_batches_tracked`` on one
    side only (files from before torch 0.4.1 lack it; inference does not use it).

    Args:
        model: the model to load; untouched if anything is wrong.
        source: a file that ``read_state_dict`` reads, a member of ``GoogLeNet_Weights`` or its name in any case, or a
            ``Weights``.
        strict: refuse missing and unexpected keys. Shapes and dtypes must fit in any case.
        allow_nonfinite: accept NaN and infinite values.
        cache_dir: where published weights are kept (see ``fetch``).
        progress: show a progress bar while downloading.

    Raises:
        WeightsError: the weights cannot be had or read, or do not fit: the first wrong key in the model's order is named, with
            both shapes.
        TypeError: ``source`` is something else.
    """
    source = resolve(source, "source")
    targets = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    variant = _built(model, targets)
    if isinstance(source, GoogLeNet_Weights) and variant in ("bvlc", "slim"):
        raise WeightsError(
            f"no weights are published for the {variant!r} variant, and {source} is for 'torchvision': "
            "give a .pth, .pt or .safetensors file of the variant's weights instead"
        )
    path = source if isinstance(source, Path) else fetch(source, cache_dir, progress)
    tensors = read_state_dict(path)
    missing = [key for key in targets if key not in tensors]
    unexpected = [key for key in tensors if key not in targets]
    wrong = {}
    for key, target in targets.items():
        optional = not strict or key.endswith(_COUNTER)
        if fault := _fault(tensors.get(key), target, optional=optional, allow_nonfinite=allow_nonfinite):
            wrong[key] = fault
    has_heads = any(key.startswith(_AUX_HEADS) for key in targets)
    surplus = [key for key in unexpected if not (key.endswith(_COUNTER) or (key.startswith(_AUX_HEADS) and not has_heads))]
    if wrong or (strict and surplus):
        raise WeightsError(_describe(path, model, wrong, surplus if strict else [], tensors, targets))
    if not any(key in tensors for key in targets):
        raise WeightsError(f"{path} does not fit the model ({type(model).__name__}): they have no key in common")

    published = published_as(path)
    if published is not None and variant == "slim":
        raise WeightsError(f"{path} is {published.filename}, which is for the 'torchvision' variant, and the model is 'slim'")
    model.load_state_dict({key: tensors[key] for key in targets if key in tensors}, strict=False)
    if published is not None and hasattr(model, "transform_input"):
        model.transform_input = True  # type: ignore[assignment]
    return LoadedWeights(path, published, missing, unexpected)


def resolve(source: str | os.PathLike[str] | GoogLeNet_Weights | Weights, argument: str) -> Path | GoogLeNet_Weights | Weights:
    """What ``source`` stands for; nothing is read or downloaded. ``argument`` is what the caller's signature calls it.

    Raises:
        WeightsError: a string is neither a file nor the name of published weights.
        TypeError: ``source`` is something else.
    """
    if isinstance(source, str):
        if source.upper() in GoogLeNet_Weights.__members__:
            return GoogLeNet_Weights[source.upper()]
        path = Path(source).expanduser()
        if path.suffix.lower() not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX, NPZ_SUFFIX) and not path.exists():
            names = " or ".join(map(repr, sorted(GoogLeNet_Weights.__members__)))
            raise WeightsError(
                f"{source}: there is no such file, and no published weights of that name: "
                f"give a .pth, .pt or .safetensors file, {names}"
            )
        return path
    if isinstance(source, GoogLeNet_Weights | Weights):
        return source
    if isinstance(source, os.PathLike):
        return Path(source).expanduser()
    kind = f"{type(source).__module__}.{type(source).__qualname__}".removeprefix("builtins.")
    got = f"{source!r} ({kind})" if isinstance(source, int | float | Enum) else kind
    raise TypeError(f"{argument} must be a path, a member of googlenet_fused.GoogLeNet_Weights or its name, got {got}")


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
    held, built = _variant(tensors), _built(model, targets)
    if held and built and held != _variant(targets):
        return f". The file holds the {held!r} variant ({_TRAITS[held]}), the model is the {built!r} variant ({_TRAITS[built]})"
    if wrong and all(key.startswith(_AUX_HEADS) and key not in tensors for key in wrong):
        return ". The file has no auxiliary heads: build the model with aux_logits=False"
    if "fc.bias" in tensors and "fc.bias" in wrong and all(key.startswith(_CLASSIFIERS) for key in wrong):
        classes = tensors["fc.bias"].numel()
        return f". The file's classifier has {_count(classes, 'output')}: build the model with num_classes={classes}"
    return ""


_BATCH_NORM = "batch norm, no convolution bias"
_TRAITS = {"torchvision": _BATCH_NORM, "slim": _BATCH_NORM, "bvlc": "convolution biases, no batch norm"}


def _built(model: nn.Module, keys: Iterable[str]) -> str | None:
    """Which variant of GoogLeNet a model is, by its keys: slim's, which are torchvision's, need the model's own word."""
    return "slim" if getattr(model, "variant", None) == "slim" else _variant(keys)


def _variant(keys: Iterable[str]) -> str | None:
    """Which variant of GoogLeNet a state_dict comes from, by the first convolution's companions."""
    keys = set(keys)
    if "conv1.conv.weight" not in keys:
        return None
    if "conv1.bn.running_mean" in keys:
        return "torchvision"
    return "bvlc" if "conv1.conv.bias" in keys else None
