"""The values that are allowed in the files of a run or sweep. Unknown keys are ignored, so that records of later versions can be
read."""

from __future__ import annotations

import math
import re
from typing import Any

from fa_bench.runs.checked_json import (
    MAX_NUMBER,
    Check,
    complete,
    is_fraction,
    is_int,
    is_number,
    is_path,
    list_of,
    mapping_of,
    mapping_to,
    nullable,
    one_of,
    value_of,
)

#: The statuses with which a run may end.
STATUSES = ("finished", "stopped", "diverged", "failed", "interrupted")
#: The statuses of runs that ended well: after their last epoch, or because a callback stopped them.
SUCCESSES = STATUSES[:2]


def _is_score_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]{0,59}", value) is not None and value != "loss"


_TEXT = value_of("text", lambda value: isinstance(value, str))
_NAME = value_of("text, not empty", lambda value: isinstance(value, str) and value.strip() != "")
#: The check for a number, or null.
NUMBER = nullable(value_of(f"a number of at most {MAX_NUMBER:g}, or null", is_number))
_TIME = nullable(value_of(f"a number from 0 to {MAX_NUMBER:g}, or null", lambda value: is_number(value) and not value < 0))
_FRACTION = nullable(value_of("a number from 0 to 1, or null", is_fraction))
_SEED = value_of("a whole number", is_int)
_COUNT = nullable(value_of("a whole number >= 0, or null", lambda value: is_int(value, 0)))
_EPOCH = value_of("a whole number >= 1", lambda value: is_int(value, 1))
_QUANTITIES = nullable(mapping_to(nullable(mapping_to(NUMBER))))
_LAYERS = nullable(list_of(_TEXT))
_SCORE = mapping_of(
    {
        "name": value_of("a name of lower-case letters, digits and _ other than 'loss'", _is_score_name),
        "title": _NAME,
        "unit": _TEXT,
        "higher_is_better": value_of("true or false", lambda value: isinstance(value, bool)),
    }
)
_SCORES = nullable(list_of(complete(_SCORE, ("name", "title"))))
_ACCURACIES = dict.fromkeys(("test_accuracy", "test_accuracy_at_best_val", "val_accuracy", "train_accuracy"), _FRACTION)
_STEP_COST: dict[str, Check] = dict.fromkeys(
    ("multiplications", "forward", "backward", "feedback", "optimizer", "bytes_moved", "peak_memory"), _COUNT
)
_COST = mapping_of({"batch": _COUNT, "bp": nullable(mapping_of(_STEP_COST)), **_STEP_COST})
#: The check for a run's result.json.
RESULT_FILE = mapping_of(
    {
        "status": one_of(STATUSES),
        "label": _NAME,
        "group": _NAME,
        "algorithm": _NAME,
        "seed": _SEED,
        **dict.fromkeys(
            ("experiment", "architecture", "dataset", "optimizer", "config_hash", "code_hash", "data_hash", "device"),
            nullable(_TEXT),
        ),
        **dict.fromkeys(("epochs", "epoch", "step", "best_epoch"), _COUNT),
        **_ACCURACIES,
        "scores": _SCORES,
        "seconds": _TIME,
        "peak_memory_bytes": _TIME,
        "energy_wh": _TIME,
        "cost": nullable(_COST),
        "angles": _QUANTITIES,
        "probes": _QUANTITIES,
        "rule_counts": nullable(mapping_to(_COUNT)),
        **dict.fromkeys(("feedback_layers", "output_layers", "weight_transport", "energy_counters"), _LAYERS),
        "error": nullable(
            mapping_of(
                {
                    "type": nullable(_TEXT),
                    "message": nullable(_TEXT),
                    "epoch": _COUNT,
                    "step": _COUNT,
                    "layer": nullable(_TEXT),
                    "callback": nullable(_TEXT),
                }
            )
        ),
    }
)
#: The keys that a result must have.
REQUIRED = ("status", "label", "group", "algorithm", "seed")
#: The check for a line of a run's metrics.jsonl.
EPOCH_RECORD = mapping_of(
    {
        "epoch": _EPOCH,
        **_ACCURACIES,
        **dict.fromkeys(("train_loss", "val_loss", "test_loss", "lr"), NUMBER),
        "seconds": _TIME,
        "angles": _QUANTITIES,
        "probes": _QUANTITIES,
        "scores": _SCORES,
    }
)
#: The check for a line of a run's angles.jsonl.
MEASUREMENT = mapping_of(
    {
        "step": value_of("a whole number >= 0", lambda value: is_int(value, 0)),
        "epoch": value_of("a number >= 0", lambda value: is_number(value) and 0 <= value < math.inf),
        "angles": _QUANTITIES,
    }
)
#: The keys that a measurement must have.
MEASUREMENT_KEYS = ("step", "epoch", "angles")
#: The check for a run's config.yaml.
CONFIG = mapping_of(
    {
        "seed": _SEED,
        "epochs": _EPOCH,
        "scale": _TEXT,
        **dict.fromkeys(("algorithm", "architecture", "dataset", "optimizer"), _NAME),
    }
)
#: The check for a run in a sweep's sweep.json.
PLANNED = mapping_of({"directory": value_of("a path", is_path), "label": _NAME, "epochs": _EPOCH})
