"""Eval functions: callables that take a model and return scores, best one per example.

Each builder checks its rows and options at once, tokenises once, and returns a function of the
model with a fingerprint of its own, so that a journal of scores knows it again.

    builder                    rows                     what to score by
    multiple_choice            MultipleChoiceRow        accuracy, probability, log_likelihood,
                                                        calibrated_probability
    generation                 GenerationRow            bleu, rouge1, rouge2, rougeL, corpus_bleu
    likelihood                 GenerationRow            probability, log_likelihood
    perplexity                 texts                    log_likelihood
    sequence_classification    ClassificationRow        accuracy, log_likelihood, macro_f1
    token_classification       TokenRow                 accuracy, log_likelihood, macro_f1
    embedding_similarity       PairRow                  rank correlation (one number)
    lm_eval_task               the harness' own         the harness' metrics

`load_rows` reads rows, `load_evals` a file with functions of the user's own, `Bleu` and `Rouge`
are metrics for the `evaluate` library; a function of your own may return an `Estimate`, a
number with its standard error. Scores are higher-is-better, all in this room.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from ..scoring import Estimate as Estimate
from .base import EvalFunction as EvalFunction
from .base import EvalRowError as EvalRowError
from .bootstrap import bootstrap_se as bootstrap_se
from .choice import multiple_choice as multiple_choice
from .classify import sequence_classification as sequence_classification
from .classify import token_classification as token_classification
from .data import load_rows as load_rows
from .embedding import embedding_similarity as embedding_similarity
from .files import load_evals as load_evals
from .generation import generation as generation
from .harness import lm_eval_task as lm_eval_task
from .likelihood import likelihood as likelihood
from .perplexity import perplexity as perplexity
from .rows import ClassificationRow as ClassificationRow
from .rows import GenerationRow as GenerationRow
from .rows import MultipleChoiceRow as MultipleChoiceRow
from .rows import PairRow as PairRow
from .rows import TokenRow as TokenRow

if _TYPE_CHECKING:
    from .metrics import Bleu as Bleu
    from .metrics import Rouge as Rouge

__all__ = [
    "Bleu",
    "ClassificationRow",
    "Estimate",
    "EvalFunction",
    "EvalRowError",
    "GenerationRow",
    "MultipleChoiceRow",
    "PairRow",
    "Rouge",
    "TokenRow",
    "bootstrap_se",
    "embedding_similarity",
    "generation",
    "likelihood",
    "lm_eval_task",
    "load_evals",
    "load_rows",
    "multiple_choice",
    "perplexity",
    "sequence_classification",
    "token_classification",
]


def __getattr__(name: str) -> _Any:
    # These subclass a class of the evaluate library, an optional extra.
    if name in ("Bleu", "Rouge"):
        try:
            from . import metrics
        except ImportError as exc:
            from ..errors import MissingExtraError

            raise MissingExtraError(
                f"{name} needs evaluate: pip install 'peft-himerge[evals]'."
            ) from exc
        return getattr(metrics, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
