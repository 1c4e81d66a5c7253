"""The data that TensorBoard's HParams tab shows for a run: its hyperparameters, the table's columns, and how the run ended."""

# Protobuf modules create their classes at import.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from fa_bench.errors import format_value

#: The hyperparameters that every run has, by command-line key, and whether each of them is a number.
HYPERPARAMETERS = {
    "algorithm": False,
    "architecture": False,
    "dataset": False,
    "optimizer": False,
    "optimizer.lr": True,
    "optimizer.weight_decay": True,
    "batch_size": True,
    "epochs": True,
    "seed": True,
}
#: The hyperparameters that the table shows by default, in addition to the keys in which the runs of a sweep differ.
_DEFAULT_COLUMNS = ("algorithm", "architecture", "dataset", "optimizer.lr", "seed")
#: The TensorBoard status for each status of a run. An interrupted run has no status, because it may be resumed, and a running
#: TensorBoard keeps the first status that it reads.
STATUS = {
    "finished": api_pb2.STATUS_SUCCESS,
    "stopped": api_pb2.STATUS_SUCCESS,
    "diverged": api_pb2.STATUS_FAILURE,
    "failed": api_pb2.STATUS_FAILURE,
}


def start_of_session(
    name: str, values: Mapping[str, Any], keys: Mapping[str, bool], metrics: Iterable[str], start: float
) -> Iterator[Summary]:
    """The summaries at the start of a run's session.

    Args:
        name: the name of the run in the table; runs with the same name share a row.
        values: the run's config by command-line key; hyperparameters that are missing in it are left blank.
        keys: hyperparameters in addition to `HYPERPARAMETERS`, and whether their values are numbers in all runs. All runs that
            are shown together must have the same keys, because TensorBoard takes the columns from one of the runs.
        metrics: the tags of the table's other columns.
        start: the time at which the run started, in seconds.
    """
    session = plugin_data_pb2.SessionStartInfo(group_name=name, start_time_secs=start)
    infos = []
    for key, is_number in {**HYPERPARAMETERS, **keys}.items():
        infos.append(
            api_pb2.HParamInfo(
                name=key,
                type=api_pb2.DATA_TYPE_FLOAT64 if is_number else api_pb2.DATA_TYPE_STRING,
                differs=key in keys or key in _DEFAULT_COLUMNS,
            )
        )
        if key in values and is_number and isinstance(values[key], (int, float)):
            session.hparams[key].number_value = values[key]
        elif key in values:
            session.hparams[key].string_value = format_value(values[key])
    experiment = api_pb2.Experiment(
        hparam_infos=infos, metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics]
    )
    yield _summary(metadata.EXPERIMENT_TAG, experiment=experiment)
    yield _summary(metadata.SESSION_START_INFO_TAG, session_start_info=session)


def end_of_session(status: str, end: float) -> Summary:
    """The summary at the end of a session, with a status that is a key of `STATUS` and the end time in seconds."""
    info = plugin_data_pb2.SessionEndInfo(status=STATUS[status], end_time_secs=end)
    return _summary(metadata.SESSION_END_INFO_TAG, session_end_info=info)


def _summary(tag: str, **content: Any) -> Summary:
    plugin = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(**content))
    return Summary(value=[Summary.Value(tag=tag, metadata=plugin, tensor=metadata.NULL_TENSOR)])
