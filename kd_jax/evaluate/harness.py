"""EleutherAI's lm-eval on an exported model.

lm-eval needs PyTorch. lm-eval is not a requirement of the project, and is imported only for the flag --lm_eval.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_jax.resolve import nearest
from kd_jax.storage.files import Json

Score = Json  # task, metric, value, error (or None), shots, prompts


def make(tasks: str, path: str = "", dtype: str = "float32", **options: Any) -> Callable[[Path], list[Score]]:
    """Returns a function that evaluates a Hugging Face folder on tasks of lm-eval.

    The function checks that all tasks exist. On a GPU, JAX reserves most of the memory at the start, and PyTorch needs
    memory, too. Set XLA_PYTHON_CLIENT_PREALLOCATE=false so that JAX reserves no memory.

    Args:
      tasks: the names of tasks, groups or tags, or patterns of names, separated by commas.
      path: a folder with your own tasks, one YAML file for each task; empty for none.
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
        task_manager = importlib.import_module("lm_eval.tasks").TaskManager
        # lm-eval can be imported without its extra hf, but this module cannot.
        importlib.import_module("lm_eval.models.huggingface")
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ValueError(
            f"--lm_eval={tasks} needs lm-eval with its extra hf (PyTorch, transformers), which cannot be imported "
            f"({error}): pip install 'lm-eval[hf]'."
        ) from error
    if path and not Path(path).expanduser().is_dir():
        raise ValueError(f"there is no folder --lm_eval_path={path}.")
    manager = task_manager(include_path=str(Path(path).expanduser()) if path else None)
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
        results = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": dtype}, tasks=list(dict.fromkeys(names)),
            task_manager=manager, device=device, log_samples=False, **options,
        )  # fmt: skip
        return scores(results)

    return evaluate


def scores(results: Json) -> list[Score]:
    """Returns the results of `lm_eval.simple_evaluate` as rows, one for each metric.

    A metric with a filter is called METRIC (FILTER).
    """
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            rows.append({
                "task": task, "metric": metric if kind == "none" else f"{metric} ({kind})", "value": value,
                "error": error if isinstance(error, int | float) else None, "shots": results["n-shot"].get(task),
                "prompts": results["n-samples"].get(task, {}).get("effective"),
            })  # fmt: skip
    return rows
