"""A small ablation: the runs, the table, the plots, and a second call of the command."""

import importlib
import json
import statistics

import pytest

from configs import forward_kl, reverse_kl
from configs.ablations import base
from kd_jax import ablate
from kd_jax.objectives import make_terms
from kd_jax.report import comparison
from kd_jax.run.rows import make_source
from kd_jax.settings import Settings

pytestmark = pytest.mark.usefixtures("one_device")
TERM = "objective.terms.distil.divergence"


def small(data_dir, **axes):
    config = base.short(forward_kl.get_config("smoke"))
    config.data.data_dir, config.mesh.data = str(data_dir), 1
    config.objective.terms.distil.divergence = {"name": "alpha_beta", "alpha": 0.2, "beta": 0.7}
    axes = axes or {"alpha": (f"{TERM}.alpha", (0.0, 0.5)), "beta": (f"{TERM}.beta", (1.0,))}
    return base.ablation(config, axes, seeds=(0, 1), metrics=("forward_kl", "rouge_l"))


def test_runs_that_would_replace_each_others_upload_are_refused(tmp_path, data_dir):
    config = small(data_dir)
    config.base.push = "hf://org/student"
    with pytest.raises(ValueError, match="base.push='hf://org/student': the runs of an ablation would replace"):
        ablate.run(config, str(tmp_path / "ablation"))
    config.base.push, config.base.teacher.path = "", "hf://org/mo del"
    with pytest.raises(ValueError, match="teacher.path=hf://org/mo del is no address on the Hugging Face hub"):
        ablate.run(config, str(tmp_path / "ablation"))
    assert not (tmp_path / "ablation").exists()


@pytest.mark.slow
def test_an_ablation_goes_on_where_it_stopped(tmp_path, data_dir, monkeypatch):
    config, calls, real = small(data_dir), [], ablate.train.train

    def flaky(its_config, workdir, quiet):
        calls.append((its_config.objective.terms.distil.divergence.alpha, its_config.seed))
        if len(calls) == 2:
            raise FloatingPointError("at step 1 the loss is nan")
        return real(its_config, workdir, quiet=quiet)

    monkeypatch.setattr(ablate.train, "train", flaky)
    ablate.run(config, str(tmp_path), shard=(3, 4))
    assert calls == [(0.5, 1)], "of four runs the fourth"
    text = ablate.run(config, str(tmp_path))
    assert calls[1:] == [(0.0, 0), (0.5, 0), (0.0, 1)], "all points before the second seed"
    assert "Failed" in text and "alpha=0.0,beta=1.0,seed=0" in text
    with pytest.raises(ValueError, match="has no ablation"):
        ablate.run(config, str(tmp_path / "nothing"), shard=None)
    assert not (tmp_path / "nothing").exists()
    assert ablate.run(config, str(tmp_path), shard=None) == text and len(calls) == 4, "a table alone runs nothing"
    assert "the loss is nan" in (tmp_path / "alpha=0.0,beta=1.0,seed=0" / "error.txt").read_text()
    text = ablate.run(config, str(tmp_path))
    assert calls[4:] == [(0.0, 0)] and "Failed" not in text
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["point"]["alpha"], line["seed"]) for line in lines] == [(0.0, 0), (0.5, 0), (0.0, 1), (0.5, 1)]
    mean = statistics.mean(line["after"]["forward_kl"] for line in lines[::2])
    assert f"{mean:.3f} ± " in text and text == (tmp_path / "table.md").read_text().strip()
    for name in ("bars.png", "curves.png", "heatmap.png"):
        assert (tmp_path / name).stat().st_size > 5000, name
    with pytest.raises(ValueError, match="belongs to another config"):
        ablate.run(small(data_dir, alpha=(f"{TERM}.alpha", (0.3,))), str(tmp_path))


def test_the_best_of_each_column_is_marked():
    line = lambda name, seed, kl, rouge: {
        "point": {"divergence": name}, "seed": seed, "before": {"forward_kl": 5.0, "rouge_l": 0.0},
        "after": {"forward_kl": kl, "rouge_l": rouge},
    }  # fmt: skip
    done = [line("a", 0, 1.0, 3.0), line("a", 1, 2.0, 5.0), line("b", 0, 1.25, 9.0)]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in comparison.table(done, ["forward_kl", "rouge_l"]).splitlines()
    ]
    assert rows[0] == ["divergence", "forward_kl", "rouge_l", "seeds"] and rows[2][:2] == ["(before)", "5.000 ± 0.000"]
    assert rows[3] == ["a", "1.500 ± 0.707", "4.000 ± 1.414", "2"]
    assert rows[4] == ["b", "**1.250**", "**9.000**", "1"]


def test_what_does_not_fit_is_told_before_anything_runs(tmp_path, data_dir):
    with pytest.raises(ValueError, match="the axis 'skew': objective.terms.distil.skew=1 does not fit the base"):
        ablate.run(small(data_dir, skew=("objective.terms.distil.skew", (1,))), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="the axis 'alpha' has no values"):
        ablate.run(small(data_dir, alpha=(f"{TERM}.alpha", ())), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="must have a value for each of a, b"):
        ablate.run(small(data_dir, pair=(("a", "b"), ((1, 2, 3),))), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="two runs would have the folder 'path=xy,seed=0'"):
        ablate.run(small(data_dir, path=("teacher.path", ("x/y", "xy"))), str(tmp_path / "run"))
    with pytest.raises(KeyError, match="an axis is called 'method'"):
        base.ablation({"a": small(data_dir).base}, {"method": ("steps", (1,))})
    with pytest.raises(ValueError, match=r"seeds=\('a',\) must be a tuple of whole numbers"):
        config = small(data_dir)
        config.seeds = ("a",)
        ablate.run(config, str(tmp_path / "run"))
    with pytest.raises(ValueError, match="steps=None must be a whole number"):
        ablate.run(small(data_dir, steps=("steps", (None,))), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="0 <= I < N"):
        ablate.run(small(data_dir), str(tmp_path / "run"), shard=(2, 2))
    assert not (tmp_path / "run").exists()
    with pytest.raises(KeyError, match="seed"):
        base.ablation(small(data_dir).base, {}, seed=1)


NAMES = (
    "abkd_plane", "amid_plane", "assistants", "capacity_gap", "divergences", "prefix_sources", "schedules", "supports",
    "token_weights",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_point_of_the_ablations_fits_its_base(name):
    config = importlib.import_module(f"configs.ablations.{name}").get_config("smoke")
    for point in ablate.points(config):
        its_own = ablate.configured(config, point, seed=7)
        assert its_own.seed == 7
        settings = Settings.parse(its_own)
        make_source(settings, make_terms(settings.objective.terms, max_new_tokens=8))


def test_a_list_of_combinations_and_several_bases(data_dir):
    bases = {"z": forward_kl.get_config("smoke"), "a": reverse_kl.get_config("smoke")}
    axes = {"rate, steps": (("learning_rate.init_value", "steps"), ((1e-3, 2), (2e-3, 3)))}
    config = base.ablation(bases, axes, label="direction")
    found = [(point, ablate.configured(config, point, seed=0)) for point in ablate.points(config)]
    assert [point["direction"] for point, _ in found] == ["z", "z", "a", "a"], "in their own order"
    assert [c.objective.terms.distil.divergence.name for _, c in found[1:3]] == ["forward_kl", "reverse_kl"]
    assert [(c.learning_rate.init_value, c.steps, c.learning_rate.decay_steps) for _, c in found[:2]] == [
        (1e-3, 2, 2), (2e-3, 3, 3),
    ]  # fmt: skip
