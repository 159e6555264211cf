"""Views: the text and the positions of a teacher that reads another prompt, in data rows, packed rows and rollouts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from kd_jax import train, views
from kd_jax.teachers.viewed import Viewed, ViewedRow, view_arrays
from tests.helpers.paths import ROOT
from tests.helpers.runs import smoke

GOLDEN = json.loads((ROOT / "tests" / "golden" / "views.json").read_text())
TEMPLATE = {"name": "template", "text": "{prompt}\nThe answer is: {response}"}


@pytest.mark.parametrize("case", GOLDEN["demonstration"])
def test_a_template_gives_the_published_prompt(case):
    values = {"privileged_context": case["privileged_context"]}
    if "error" in case:
        with pytest.raises(ValueError):
            views.fill(case["template"], case["prompt"], values)
        return
    assert views.fill(case["template"], case["prompt"], values) == case["teacher_prompt"]


@pytest.mark.parametrize("case", GOLDEN["successful_rollout"])
def test_successful_rollouts_give_the_published_prompts(case):
    options, templates = case["options"], case["templates"]
    view = views.successful_rollout(
        "number_match", at_least=options["success_reward_threshold"], own=not options["dont_reprompt_on_self_success"],
        use_solutions=options["use_successful_as_teacher"], feedback="json:dumps",
        feedback_only_without_solution=options["environment_feedback_only_without_solution"],
        without_thinking=options["remove_thinking_from_demonstration"], text=templates["reprompt_template"],
        solution=templates["solution_template"].replace("successful_previous_attempt", "rollout"),
        remarks=templates["feedback_template"].replace("feedback_raw", "feedback"),
    )  # fmt: skip
    feedback = case["feedback"] if options["include_environment_feedback"] else [None] * len(case["feedback"])
    found = view.prompts(
        case["prompts"], case["responses_without_special_tokens"], case["rewards"], feedback, case["group_size"]
    )
    assert view.demonstrations(case["rewards"], case["group_size"]) == case["demonstration_of_row"]
    assert [prompt is not None for prompt in found] == list(map(bool, case["counted_row"]))
    shown = [own if prompt is None else prompt for prompt, own in zip(found, case["prompts"], strict=True)]
    assert shown == case["teacher_prompts"]


@pytest.mark.parametrize("case", GOLDEN["positions"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_positions_are_the_published_ones(case, packed):
    rows = [
        ViewedRow(np.array(row["student_prompt"] + row["response"]), len(row["student_prompt"]), np.array(row["teacher_prompt"]))
        for row in case["rows"]
    ]  # fmt: skip
    lines = [rows] if packed else [[row] for row in rows]
    length, view_length = 40 if packed else 12, 48 if packed else 16
    arrays = view_arrays(
        lines, len(lines) + 1, length=length, view_length=view_length, pad_id=0, member="teacher", packed=packed
    )
    tokens, mask, positions = (arrays[f"teacher_view_teacher_{part}"] for part in ("tokens", "mask", "positions"))
    start = view_start = 0
    for i, (row, expected) in enumerate(zip(rows, case["rows"], strict=True)):
        line = 0 if packed else i
        start, view_start = (start, view_start) if packed else (0, 0)
        at_student = start + np.array(expected["student_logit_positions"])
        assert (positions[line][at_student] == view_start + np.array(expected["teacher_logit_positions"])).all()
        inputs = row.of_teacher[:-1]
        assert tokens[line, view_start : view_start + len(inputs)].tolist() == inputs.tolist()
        assert (mask[line, view_start : view_start + len(inputs)] == (i + 1 if packed else 1)).all()
        start, view_start = start + len(row.tokens) - 1, view_start + len(inputs)
    assert mask.sum(where=mask > 0, dtype=int) > 0 and not mask[-1].any()


def test_a_line_that_is_too_long_is_refused():
    row = ViewedRow(np.arange(5), 2, np.arange(9))
    with pytest.raises(ValueError, match="11 tokens"):
        view_arrays([[row]], 1, length=8, view_length=8, pad_id=0, member="teacher")


def test_a_batch_without_the_arrays_is_refused():
    with pytest.raises(ValueError, match="has no teacher_view_second_tokens"):
        Viewed(None, "second").outputs({}, {"tokens": np.zeros((1, 2), int)})


def distances_by_hand(run, params, batch):
    """Returns KL(p || q) at each counted token, from whole rows that are read one at a time without padding."""
    student, teacher = run.models.student, run.models.teacher
    found = np.zeros(batch["tokens"].shape)
    for line, segments in enumerate(np.asarray(batch["mask"], int)):
        of_view = np.asarray(batch["teacher_view_teacher_mask"][line], int)
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            inside = np.flatnonzero(batch["loss_mask"][line] & (segments == segment))
            read = np.asarray(batch["teacher_view_teacher_tokens"][line])[of_view == segment]
            log = lambda model, tree, ids: jax.nn.log_softmax(
                model.logits(tree, jnp.asarray(ids[None]))[0, :, : run.tokenizer.vocab_size]
            )
            log_q = log(student, params, np.asarray(batch["tokens"])[line, at])[inside - at[0]]
            log_p = log(teacher, run.models.teacher_params, read)[len(read) - len(inside) :]
            found[line, inside] = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(prefixes={"name": "student"}),
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                dict(data__packing="rows", data__max_length=64),
                dict(prefixes={"name": "mixture", "fraction": 0.5}),
                dict(microbatches=4),
                dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
                dict(text__name="docstrings", text__batch_size=8),
                dict(prefixes={"name": "adaptive", "threshold": 1.0, "capacity": 16}),
            )
        ),
    ],
)
def test_the_loss_is_that_of_the_rows_as_both_models_read_them(changes, data_dir, request):
    if "mesh__data" not in changes:
        request.getfixturevalue("one_device")
    config = smoke("forward_kl", data_dir, **changes)
    config.teacher.view = TEMPLATE
    config.teacher.view.max_prompt_length = 40
    if config.text.name:
        with config.unlocked():
            config.objective.terms.words = base.hard_labels(rows="text")
    run = train.build(config)
    state = run.init_state()
    for step in range(2):
        batch = run.batch(step, state.params)
        expected = distances_by_hand(run, jax.device_get(state.params), jax.device_get(batch))
        counted = np.asarray(batch["loss_mask"])
        if "text__name" in changes:  # every token of the second stream counts in another term, and none in this one
            counted = counted & (np.asarray(batch["origin"]) < 3)[:, None]
        state, sums = run.train_step(state, run.models.frozen_params, batch)
        np.testing.assert_allclose(sums["distil/loss"][0], expected[counted].sum(), rtol=2e-4)
        assert np.asarray(batch["has_view"])[counted].all()


def with_view(method, data_dir, **changes):
    """Returns a smoke config whose teacher has a view; a key of `changes` may be teacher__view."""
    view = changes.pop("teacher__view", TEMPLATE)
    config = smoke(method, data_dir, **changes)
    config.teacher.view = view
    return config


@pytest.mark.usefixtures("one_device")
def test_a_successful_rollout_is_in_the_prompt_of_the_other_rows(data_dir):
    """The shown rollout is decoded, and rendered like every other prompt; rows without a rollout do not count."""
    config = smoke("sdpo", data_dir, sampling__max_new_tokens=12)
    config.teacher.view.reward, config.teacher.view.at_least = f"{__name__}:mentions_an_e", 1.0
    run = train.build(config)
    state = run.init_state()
    rows = 0
    for step in range(4):
        batch = run.feed.next(step, state.params)
        sampled = run.feed.fresh
        groups = {}  # a pool shuffles rows, so rows are found by their tokens
        texts = [response for _, response in run.feed._sampler.text(sampled)]
        for i, text in enumerate(texts):
            groups.setdefault(i // 4, []).append(text)
        for line in range(8):
            length = batch["mask"][line].sum()
            i = next(i for i in range(8) if (sampled["tokens"][i][:length] == batch["tokens"][line][:length]).all())
            others = [text for j, text in enumerate(texts) if j // 4 == i // 4 and j != i and "e" in text]
            has_view = batch["has_view"][line]
            assert has_view[batch["loss_mask"][line]].all() == bool(others) and (has_view.any() == bool(others))
            mask = batch["teacher_view_teacher_mask"][line]
            read = run.tokenizer.decode(batch["teacher_view_teacher_tokens"][line][mask].tolist())
            own = run.tokenizer.decode(batch["tokens"][line][batch["mask"][line]].tolist())
            if others:
                assert f"A correct answer is:\n\n{others[0].strip()}" in read
                rows += 1
            else:
                assert read == own
    assert rows >= 2, "no row had a view"


def mentions_an_e(response, references):
    assert len(references) == 1 and isinstance(references[0], str)
    return float("e" in response)


@pytest.mark.usefixtures("one_device")
def test_a_batch_without_any_view_has_no_loss(data_dir):
    config = smoke("sdpo", data_dir)
    config.teacher.view.at_least = 101.0
    run = train.build(config)
    state = run.init_state()
    _, sums = run.train_step(state, run.models.frozen_params, run.batch(0, state.params))
    assert float(sums["loss"][0]) == 0 and float(sums["gradient_norm"][0]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_members_have_views_of_their_own(data_dir):
    """The published trust-region teacher: a mixture of two views of the student, before training and now."""
    pretrained = dict(student__init="pretrained", student__path="package:docstrings_teacher")
    config = smoke("forward_kl", data_dir, teacher__path="student", **pretrained)
    view = {"view": TEMPLATE}
    config.members = dict(
        start=base.member(path="student", **view), live=base.member(path="student", follow=1.0, **view)
    )
    mixture = dict(assistant={"name": "geometric_mixture"}, between=("start", "live"), weight=0.25)
    base.set_terms(config, distil=base.term(pair=("assistant", "student"), **mixture))
    run = train.build(config)
    state = run.init_state()
    for step in range(3):
        batch = run.batch(step, state.params)
        read = {name: batch[f"teacher_view_{name}_tokens"] for name in ("start", "live")}
        mask, positions = (batch[f"teacher_view_start_{part}"] for part in ("mask", "positions"))
        size = run.tokenizer.vocab_size
        gathered = {
            name: jnp.take_along_axis(
                run.models.student.logits(tree, read[name], mask)[..., :size], positions[..., None], axis=1
            )
            for name, tree in {"start": run.models.member_params["start"], "live": state.params}.items()
        }
        log_p = jax.nn.log_softmax(0.75 * gathered["start"] + 0.25 * gathered["live"])
        log_q = jax.nn.log_softmax(run.models.student.logits(state.params, batch["tokens"], batch["mask"])[..., :size])
        expected = jnp.where(batch["loss_mask"], (jnp.exp(log_p) * (log_p - log_q)).sum(-1), 0).sum()
        state, sums = run.train_step(state, run.models.frozen_params, batch)
        np.testing.assert_allclose(sums["distil/loss"][0], expected, rtol=1e-4)


def rows_file(folder, columns=None):
    """Writes a JSON-lines file with rows of two domains. Returns the path."""
    lines = [
        {"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}.", "domain": domain, "level": i % 3}
        for i, domain in enumerate(("math", "code") * 24)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**line, **(columns or {})}) + "\n" for line in lines))
    return path


def on_file(path, data_dir, *, where=None, view=None, **changes):
    config = smoke("forward_kl", data_dir, data__name="jsonl", **changes)
    config.data.options = {"path": str(path), "validation_fraction": 0.1}
    if view:
        config.teacher.view = view
    for number, condition in enumerate(where or ()):
        with config.unlocked():
            config.objective.terms[f"term{number}"] = base.term(where=condition)
    if where:
        config.objective.terms.distil = None
    return config


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("changes", [{}, dict(data__packing="rows"), dict(prefixes={"name": "student"})])
def test_where_divides_the_rows_among_the_terms(changes, data_dir, tmp_path):
    where = [{"domain": "math"}, {"domain": ["code"]}, {"domain": "math", "level": 1}]
    run = train.build(on_file(rows_file(tmp_path), data_dir, where=where, **changes))
    state = run.init_state()
    batch = run.batch(0, state.params)
    counted, masks = np.asarray(batch["loss_mask"]), [np.asarray(batch[f"where_term{i}"]) for i in range(3)]
    assert (masks[0][counted] ^ masks[1][counted]).all() and masks[0][counted].any() and masks[1][counted].any()
    assert not (masks[2] & ~masks[0]).any()
    for line in range(8):
        for segment in range(1, int(np.asarray(batch["mask"][line], int).max()) + 1):
            at = np.asarray(batch["mask"][line], int) == segment
            text = run.tokenizer.decode(np.asarray(batch["tokens"][line])[at].tolist())
            number = int(text.split("What is ")[1].split()[0])
            assert (masks[0][line][at] == (number % 2 == 0)).all()
            assert (masks[2][line][at] == (number % 2 == 0 and number % 3 == 1)).all()
    _, sums = run.train_step(state, run.models.frozen_params, batch)
    for i, mask in enumerate(masks):
        assert float(sums[f"term{i}/loss"][1]) == (mask & counted).sum()


@pytest.mark.usefixtures("one_device")
def test_a_row_with_an_empty_column_has_no_view(data_dir, tmp_path):
    lines = [{"prompt": f"Add {i}.", "response": f"{i} more.", "hint": "" if i % 2 else f"hint {i}"} for i in range(32)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    view = {"name": "template", "text": "{prompt} ({hint})"}
    run = train.build(on_file(path, data_dir, view=view))
    batch = run.feed.next(0, None)
    for line in range(8):
        mask = batch["teacher_view_teacher_mask"][line]
        read = run.tokenizer.decode(batch["teacher_view_teacher_tokens"][line][mask].tolist())
        number = int(read.split("Add ")[1].split(".")[0])
        assert ("(hint " in read) == (number % 2 == 0) == bool(batch["has_view"][line][batch["loss_mask"][line]].all())


def first_words(row, *, count):
    """A view of one's own."""
    return None if len(row["response"]) < 3 else f"{row['prompt']} {' '.join(row['response'].split()[:count])}"


@pytest.mark.usefixtures("one_device")
def test_a_view_of_ones_own(data_dir, tmp_path):
    view = {"name": f"{__name__}:first_words", "count": 2, "max_prompt_length": 30}
    run = train.build(on_file(rows_file(tmp_path), data_dir, view=view))
    batch = run.feed.next(0, None)
    mask = batch["teacher_view_teacher_mask"][0]
    assert "? It is\n" in run.tokenizer.decode(batch["teacher_view_teacher_tokens"][0][mask].tolist())


def wrong(row, *, how):
    """A view with a fault."""
    return {"empty": "", "none": None, "number": 5}[how]


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("reward", "message"), [("raising", "failed: ZeroDivisionError"), ("not_a_number", "the reward must be")]
)
def test_a_reward_that_fails_names_the_key(reward, message, data_dir):
    config = smoke("sdpo", data_dir)
    config.teacher.view.reward = f"{__name__}:{reward}"
    run = train.build(config)
    with pytest.raises(ValueError, match=f"teacher.view: .*{message}"):
        run.feed.next(0, run.init_state().params)


def raising(response, references):
    return 1 / 0


def not_a_number(response, references):
    return float("nan")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_teachers_text_keeps_the_columns_and_the_response_of_the_dataset(data_dir, tmp_path):
    """A view of `{response}` shows the response of the dataset, and changed columns change the stored responses."""
    lines = [{"prompt": f"def f{i}(): return {i}", "response": f"Returns {i}.", "hint": f"h{i}"} for i in range(48)]
    path, view = tmp_path / "rows.jsonl", {"name": "template", "text": "{prompt} {hint} {response}"}

    def read(lines):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = on_file(path, tmp_path, view=view, prefixes={"name": "teacher"}, sampling__max_new_tokens=16)
        config.data.data_dir = str(tmp_path / "data")
        run = train.build(config)
        batch = run.feed.next(0, None)
        mask = batch["teacher_view_teacher_mask"][0]
        return run.tokenizer.decode(batch["teacher_view_teacher_tokens"][0][mask].tolist())

    text = read(lines)
    number = int(text.split("return ")[1].split()[0])
    assert f"return {number} h{number} Returns {number}." in text
    assert " new" in read([line | {"hint": line["hint"].replace("h", "new")} for line in lines])


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher__view={"name": "template", "text": "{prompt} {hnt}"}), "the column 'hnt'.*did you mean 'hint'"),
        (
            dict(teacher__view={"name": "template", "text": "{prompt}{context}"}),
            "names no column other than the prompt",
        ),
        (dict(teacher__view={"name": "template", "text": ""}), "names no column other than the prompt"),
        (
            dict(teacher__view={"name": f"{__name__}:wrong", "how": "empty"}),
            "teacher.view: a prompt of the view has no token",
        ),
        (dict(teacher__view={"name": f"{__name__}:wrong", "how": "none"}), "teacher.view: no row has a view"),
        (
            dict(teacher__view={"name": f"{__name__}:wrong", "how": "number"}),
            "teacher.view: the function wrong returned 5",
        ),
        (
            dict(teacher__view={"name": f"{__name__}:wrong", "how": "raises"}),
            "teacher.view: the function .*wrong failed: KeyError",
        ),
        (
            dict(teacher__view={"name": f"{__name__}:wrong", "how": "empty", "columns": "hint"}),
            "columns='hint' must be a list",
        ),
        (
            dict(
                teacher__view={"name": "successful_rollout", "reward": "rouge_l", "use_solutions": False},
                prefixes={"name": "student"},
            ),
            "shows the teacher nothing",
        ),
        (dict(teacher__view={"name": "tmplate", "text": "{hint}"}), "did you mean 'template'"),
        (dict(data__loss_on="all"), "data.loss_on='response'"),
        (dict(data__packing="stream"), "teacher.view reads the columns"),
        (dict(teacher__view={"name": "successful_rollout", "reward": "rouge_l"}), "set prefixes.name='student'"),
        (
            dict(teacher__view={"name": "successful_rollout", "reward": "rouge_l"}, prefixes={"name": "student"}),
            "rollouts_per_prompt=1; set at least 2",
        ),
        (
            dict(
                teacher__view={"name": "successful_rollout", "reward": "rogue_l"},
                prefixes={"name": "student"},
                sampling__rollouts_per_prompt=2,
            ),
            "did you mean 'rouge_l'",
        ),
        (
            dict(teacher__view={"name": "template", "text": "{prompt} {response}", "max_prompt_length": -1}),
            "max_prompt_length",
        ),
    ],
)
def test_views_that_cannot_be_used_are_refused(changes, message, data_dir):
    with pytest.raises(ValueError, match=message):
        train.build(with_view("forward_kl", data_dir, **changes))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(
    ("where", "changes", "message"),
    [
        ({"domain": "maths"}, {}, "no row has domain='maths'; the values of the column are code, math"),
        ({"topic": "math"}, {}, r"rows.jsonl:1: the field 'topic' is missing"),
        ({"domain": ["math", "cod"]}, {}, "no row has domain='cod'"),
        ({"domain": "math", "prompt": "What is 1 + 1?"}, {}, "no row has a value of each column at the same time"),
        ({"prompt": "nope"}, {}, r"and \d+ more"),
        ({"domain": {"a": 1}}, {}, "must be a text, a number, or a list"),
        ({"domain": "math"}, dict(data__packing="stream"), "term0.where reads the columns"),
    ],
)
def test_conditions_that_cannot_be_used_are_refused(where, changes, message, data_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.build(on_file(rows_file(tmp_path), data_dir, where=[where], **changes))


@pytest.mark.usefixtures("one_device")
def test_a_view_of_a_column_that_a_line_lacks_names_file_and_line(data_dir, tmp_path):
    path = rows_file(tmp_path, {"hint": "see above"})
    lines = path.read_text().splitlines()
    lines[6] = json.dumps({"prompt": "p", "response": "r", "domain": "math"})
    path.write_text("\n".join(lines))
    view = {"name": "template", "text": "{prompt} {hint}"}
    with pytest.raises(ValueError, match=r"rows.jsonl:7: the field 'hint' is missing"):
        train.build(on_file(path, data_dir, view=view))


@pytest.mark.usefixtures("one_device")
def test_a_response_that_does_not_end_the_text_is_refused(data_dir, tmp_path, monkeypatch):
    """A tokenizer may join the prompt's last characters with the response's first ones."""
    from kd_jax.data import encoding

    rendered = encoding.prompts.make_render

    def render(template, tokenizer):
        write = rendered(template, tokenizer)
        return lambda prompt, context: write(prompt, context).rstrip("\n") if "~" in prompt else write(prompt, context)

    monkeypatch.setattr(encoding.prompts, "make_render", render)
    view = {"name": "template", "text": "{prompt} {response}~It"}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "response": f"em {i}"}) + "\n" for i in range(40)))
    with pytest.raises(ValueError, match="teacher.view: the response does not end the text that the model reads"):
        train.build(on_file(path, data_dir, view=view))


@pytest.mark.usefixtures("one_device")
def test_the_gate_of_views_needs_a_view(data_dir):
    config = smoke("forward_kl", data_dir)
    config.objective.terms.distil.row_gate = {"name": "has_view"}
    with pytest.raises(ValueError, match="set teacher.view"):
        train.build(config)
