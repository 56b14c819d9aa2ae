"""Is an attribution right? Retraining banks, and the metrics that compare scores with what retraining did.

A :class:`Bank` holds many trainings of one :class:`Protocol` on different subsets; :func:`evaluate_scores` compares any
score matrix with it. :mod:`pyinf.evaluate.pbrf` is the ground truth that involves no retraining,
:mod:`pyinf.evaluate.retrieval` the metrics against labels or a reference ranking.
"""

from pyinf.evaluate.bank import Bank, Entry
from pyinf.evaluate.board import DAMPINGS, compare_rows, read_rows, run_row, time_row
from pyinf.evaluate.counterfactual import (
    LDS,
    Brittleness,
    NoiseCeiling,
    QueryLossDifference,
    brittleness,
    group_effect,
    lds,
    lds_difference,
    leave_one_out_correlation,
    noise_ceiling,
    query_loss_difference,
)
from pyinf.evaluate.evaluation import (
    Evaluation,
    bank_noise,
    choose_damping,
    evaluate_scores,
    plan_removals,
    to_csv,
    to_rows,
)
from pyinf.evaluate.language_model import PROTOCOLS, LanguageModelProtocol, ready_protocol
from pyinf.evaluate.matrices import load_matrix
from pyinf.evaluate.pbrf import FiveTerms, ProximalBregman, five_terms
from pyinf.evaluate.protocol import FunctionProtocol, Protocol, Trained
from pyinf.evaluate.retrieval import (
    accuracy,
    auprc,
    auroc,
    cover,
    mean_reciprocal_rank,
    ndcg,
    recall_at,
    same_label,
)
from pyinf.evaluate.statistics import Estimate, average_ranks, bootstrap_mean, pearson, spearman
from pyinf.evaluate.subsets import (
    Retraining,
    full,
    group_copies,
    half_subsets,
    leave_one_out,
    random_removals,
    top_k_removals,
)
from pyinf.evaluate.tail_patch import tail_patch

__all__ = [
    "DAMPINGS",
    "LDS",
    "PROTOCOLS",
    "Bank",
    "Brittleness",
    "Entry",
    "Estimate",
    "Evaluation",
    "FiveTerms",
    "FunctionProtocol",
    "LanguageModelProtocol",
    "NoiseCeiling",
    "Protocol",
    "ProximalBregman",
    "QueryLossDifference",
    "Retraining",
    "Trained",
    "accuracy",
    "auprc",
    "auroc",
    "average_ranks",
    "bank_noise",
    "bootstrap_mean",
    "brittleness",
    "choose_damping",
    "compare_rows",
    "cover",
    "evaluate_scores",
    "five_terms",
    "full",
    "group_copies",
    "group_effect",
    "half_subsets",
    "lds",
    "lds_difference",
    "leave_one_out",
    "leave_one_out_correlation",
    "load_matrix",
    "mean_reciprocal_rank",
    "ndcg",
    "noise_ceiling",
    "pearson",
    "plan_removals",
    "query_loss_difference",
    "random_removals",
    "read_rows",
    "ready_protocol",
    "recall_at",
    "run_row",
    "same_label",
    "spearman",
    "tail_patch",
    "time_row",
    "to_csv",
    "to_rows",
    "top_k_removals",
]
