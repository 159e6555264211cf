"""EleutherAI's lm-eval on an exported model.

lm-eval needs PyTorch. It is not a requirement of the project, and is imported only if it is asked for.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_jax.resolve import nearest

Score = dict[str, Any]  # task, metric, value, error (or None), shots, prompts


def make(tasks: str, path: str = "", dtype: str = "float32", **options: Any) -> Callable[[Path], list[Score]]:
    """Returns a function that evaluates a Hugging Face folder on tasks of lm-eval.

    All tasks are checked to exist. On a GPU, JAX takes most of the memory at its start, and PyTorch needs some of it,
    too. Set XLA_PYTHON_CLIENT_PREALLOCATE=false to leave it some.

    Args:
      tasks: the names of tasks, groups or tags, or patterns of them, separated by commas.
      path: a folder with your own tasks, one YAML file for each; empty for none.
      dtype: the type of the model's parameters.
      **options: keyword arguments of `lm_eval.simple_evaluate`. For example, `limit=100` uses the first hundred prompts
        of each task.

    Raises:
      ValueError: lm-eval is not installed, or a folder or a task does not exist.

    References:
      Gao et al., "The Language Model Evaluation Harness", https://github.com/EleutherAI/lm-evaluation-harness, 2024.
    """
    try:
        lm_eval = importlib.import_module("lm_eval")
        manage = importlib.import_module("lm_eval.tasks").TaskManager
        # The extra hf brings this module. lm-eval can be imported without it.
        importlib.import_module("lm_eval.models.huggingface")
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(
            f"--lm_eval={tasks} needs lm-eval with its extra hf (PyTorch, transformers), which cannot be imported ({error}): "
            f"pip install 'lm-eval[hf]'."
        ) from error
    if path and not Path(path).expanduser().is_dir():
        raise ValueError(f"there is no folder --lm_eval_path={path}.")
    manager = manage(include_path=str(Path(path).expanduser()) if path else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"  # the default of lm-eval is cuda, even without a GPU
    names: list[str] = []
    for task in filter(None, (task.strip() for task in tasks.split(","))):
        matches = manager.match_tasks([task])
        if not matches:
            raise ValueError(
                f"lm-eval has no task {task!r}{nearest(task, manager.all_tasks)}; `lm-eval ls tasks` lists them."
            )
        names += matches
    if not names:
        raise ValueError(f"--lm_eval={tasks!r} names no task.")

    def evaluate(folder: Path) -> list[Score]:
        found = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": dtype}, tasks=list(dict.fromkeys(names)),
            task_manager=manager, device=device, log_samples=False, **options,
        )  # fmt: skip
        return scores(found)

    return evaluate


def scores(found: dict[str, Any]) -> list[Score]:
    """Returns the results of `lm_eval.simple_evaluate` as rows, one for each metric.

    A metric that has a filter is called METRIC (FILTER).
    """
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            rows.append({
                "task": task, "metric": metric if kind == "none" else f"{metric} ({kind})", "value": value,
                "error": error if isinstance(error, int | float) else None, "shots": found["n-shot"].get(task),
                "prompts": found["n-samples"].get(task, {}).get("effective"),
            })  # fmt: skip
    return rows
