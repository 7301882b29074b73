"""Evaluation as in the GoogLeNet paper, section 7: centre crop, 10 and 144 crops, single networks and ensembles."""

from googlenet_fused.evaluation.engine import Corrupt, Evaluation, Prediction, Score, evaluate
from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.evaluation.labels import Labels, match
from googlenet_fused.evaluation.members import DEFAULT, DTYPES, Member, check_agreement, load_member, read_weights_list
from googlenet_fused.evaluation.predictions import check_predictions_path, write_predictions

__all__ = [
    "DEFAULT",
    "DTYPES",
    "Corrupt",
    "Evaluation",
    "EvaluationError",
    "Labels",
    "Member",
    "Prediction",
    "Score",
    "check_agreement",
    "check_predictions_path",
    "evaluate",
    "load_member",
    "match",
    "read_weights_list",
    "write_predictions",
]
