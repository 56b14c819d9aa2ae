"""Train-by-query scores."""

from pyinf.score.engine import DenseSink, ScoreConsumer, SelfScoreConsumer, TokenSink, TopKSink, check_finite
from pyinf.score.queries import QueryBlock, QueryConsumer, parse_rank
from pyinf.score.scores import Scores
from pyinf.score.shared_basis import check_basis, shared_block

__all__ = [
    "DenseSink",
    "QueryBlock",
    "QueryConsumer",
    "ScoreConsumer",
    "Scores",
    "SelfScoreConsumer",
    "TokenSink",
    "TopKSink",
    "check_basis",
    "check_finite",
    "parse_rank",
    "shared_block",
]
