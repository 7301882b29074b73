"""Which class of the classifier each class of the data is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.evaluation.members import Member

BACKGROUND = "background"
_NAMED = 5
"""How many names an error tells."""


@dataclass(frozen=True)
class Labels:
    """The data's classes among the classifier's.

    Attributes:
        index: by class of the data, the class of the classifier.
        names: by class of the classifier.
    """

    index: tuple[int, ...]
    names: tuple[str, ...]


def match(classes: Sequence[str], members: Sequence[Member], *, by_order: bool = False) -> Labels:
    """Matches the classes of the data to those of the networks, which agree on theirs.

    Names decide where a network knows its own; the data may then have fewer classes than the classifier. Else, or with
    ``by_order``, the numbers of classes must be equal, and the first is the first; the background class of TF-slim's 1001 is
    passed over.

    Raises:
        EvaluationError: a class of the data is unknown to the networks or ambiguous, or the numbers differ.
    """
    names = next((member.classes for member in members if member.classes is not None), None)
    network = members[0]
    offset = int(network.background)
    foreground = network.num_classes - offset
    if names is None or by_order:
        if len(classes) != foreground:
            why = "by order" if by_order else f"and {network.name} does not say which its own are"
            raise EvaluationError(
                f"the data has {len(classes)} classes ({_some(classes)}) and the classifier {foreground}, {why}: "
                "evaluate on a folder for each class of the classifier, or give a file of weights that holds its class names"
            )
        known = names or (*([BACKGROUND] * offset), *classes)
        return Labels(tuple(range(offset, network.num_classes)), tuple(known))
    count = Counter(names)
    if unknown := [name for name in classes if name not in count]:
        hint = "; if the sorted folders are the classifier's classes in order, match them by order (--by-order)"
        raise EvaluationError(
            f"{len(unknown)} of the data's {len(classes)} classes are unknown to the network {network.name}: {_some(unknown)}; "
            f"it knows {_some(names)}{hint if len(classes) == foreground else ''}"
        )
    if ambiguous := [name for name in classes if count[name] > 1]:
        raise EvaluationError(f"the network {network.name} has more than one class called {_some(ambiguous)}: match by order")
    at = {name: index for index, name in enumerate(names)}
    return Labels(tuple(at[name] for name in classes), names)


def _some(names: Sequence[str]) -> str:
    told = ", ".join(map(repr, names[:_NAMED]))
    return f"{told} and {len(names) - _NAMED} more" if len(names) > _NAMED else told
