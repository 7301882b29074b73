"""Evaluation as in the GoogLeNet paper, section 7: centre crop, 10 and 144 crops, single networks and ensembles."""

from googlenet_fused.evaluation.engine import Corrupt, Evaluation, Prediction, Progress, Score, evaluate
from googlenet_fused.evaluation.errors import EvaluationError
from googlenet_fused.evaluation.labels import Labels, match
from googlenet_fused.evaluation.members import DEFAULT, DTYPES, Member, check_agreement, load_member, read_weights_list
from googlenet_fused.evaluation.predictions import check_predictions_path, write_predictions
from googlenet_fused.evaluation.report import Row, document, error_chart, print_table, rows

__all__ = [
    "DEFAULT",
    "DTYPES",
    "Corrupt",
    "Evaluation",
    "EvaluationError",
    "Labels",
    "Member",
    "Prediction",
    "Progress",
    "Row",
    "Score",
    "check_agreement",
    "check_predictions_path",
    "document",
    "error_chart",
    "evaluate",
    "load_member",
    "match",
    "print_table",
    "read_weights_list",
    "rows",
    "write_predictions",
]
