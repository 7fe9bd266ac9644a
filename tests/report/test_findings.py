"""The verdict: each thing that can be wrong with a run is said, and a run that went well is not suspected."""

import pytest

from preceptor.export.card import _evaluation
from preceptor.report.curves import panels
from preceptor.report.facts import facts
from preceptor.report.findings import judge, spikes, warnings_so_far
from preceptor.report.page import page_of_run
from preceptor.report.run_record import read_run
from runs import COMPARE, DATA, ENVIRONMENT, compared, looks, sample, steps, write_run


def judged(folder, **files):
    return judge(read_run(write_run(folder, **files)))


def test_a_run_that_went_well_is_not_suspected(tmp_path):
    verdict = judged(tmp_path / "a")
    assert verdict.level == "good" and verdict.headline == "It learned; nothing looks suspicious"
    said = " ".join(finding.seen for finding in verdict.findings)
    assert "held-out loss fell by 75%: 3.000 before the first step, 0.750 after step 20" in said
    assert "training loss fell by 85%: 2.850 in the first tenth of the steps, 0.428 in the last" in said
    assert "Answers stop by themselves: 3 of 3 (100%; 95% interval 29% to 100%)" in said
    assert "All 100 examples" in said


HELD_OUT = {"held_out": {"num_examples": 20, "num_rejected": 0}}


def test_what_is_proved_trained_and_measured_is_counted_apart(tmp_path):
    """A source's `weight` and `count` choose among the examples that are proved."""
    data = DATA | HELD_OUT | {"examples_per_epoch": 50, "num_held_out": 7}
    said = " ".join(finding.seen for finding in judged(tmp_path / "a", data=data).findings)
    assert "so are the 20 held-out ones: 50 are trained in an epoch, 7 are measured." in said
    stream = DATA | {"examples_per_epoch": None}
    said = " ".join(finding.seen for finding in judged(tmp_path / "b", data=stream).findings)
    assert "All 100 examples are proved to be exactly what inference will see." in said


def test_examples_to_train_on_and_held_out_ones_are_counted_apart(tmp_path):
    record = read_run(write_run(tmp_path / "a", data=DATA | HELD_OUT))
    assert facts(record)["examples in the data"] == "80 to train on, 20 held out"
    said = " ".join(finding.seen for finding in judge(record).findings)
    proved = "All 80 examples are proved to be exactly what inference will see, and so are the 20 held-out ones: "
    assert f"{proved}100 are trained in an epoch." in said
    data = DATA | {"held_out": {"num_examples": 20, "num_rejected": 2}}
    record = read_run(write_run(tmp_path / "b", data=data, rejections=REJECTED))
    assert facts(record)["rejected"] == "6, 2 of them held out"
    found = {finding.seen: finding.level for finding in judge(record).findings}
    assert found["4 of 80 (5.0%) examples were rejected and not trained."] == "note"
    assert found["2 of 20 (10%) held-out examples were rejected and not measured."] == "warning"


FLAT, RISING = [2.0] * 20, [1.0 + step / 10 for step in range(20)]
NORMS = [0.5] * 15 + [9.0] + [0.5] * 4
LAST = {"num_truncated": 3, "num_split": 1}
REJECTED = [{"source": f"rows.jsonl:{line}", "code": "too_long", "message": "too long: cut it"} for line in range(6)]


@pytest.mark.parametrize(
    ("files", "level", "words"),
    [
        ({"metrics": steps(FLAT)}, "error", "Nothing was learned: training loss 2.000"),
        ({"metrics": steps(RISING)}, "error", "The training loss rose"),
        (
            {"metrics": steps(RISING[:6])},
            "note",
            "Training loss 1.000 in the first step, 1.500 in the last; so few steps",
        ),
        ({"metrics": steps([1.0, float("nan"), 1.0])}, "error", "not finite from step 2"),
        ({"eval": looks((0, 2.0), (20, 2.0))}, "warning", "held-out loss did not fall"),
        (
            {"eval": looks((0, 3.0), (10, 1.0), (20, 1.1))},
            "warning",
            "lowest after step 10 (1.000) and then rose to 1.100",
        ),
        ({"eval": []}, "note", "Neither a loss on held-out examples nor answers to them were measured"),
        ({"eval": looks((0, 3.0), (20, 1.5))}, "note", "The training loss (0.428) is much lower"),
        ({"metrics": steps([3 * 0.9**s for s in range(20)], grad_norm=NORMS)}, "warning", "at 1 step: 16"),
        ({"metrics": steps([3 * 0.9**s for s in range(20)], grad_norm=2.0)}, "note", "scaled to optimizer.max_grad"),
        ({"data": DATA | {"fill": 0.4}}, "note", "Tokens fill only 40% of the packed sequences"),
        (
            {"data": DATA | {"shortened": LAST}},
            "note",
            "3 examples were too long and lost their oldest context; 1 was split",
        ),
        ({"rejections": REJECTED}, "warning", "6 of 100 (6.0%) examples were rejected"),
        ({"rejections": REJECTED[:1]}, "note", "1 of 100 (1.0%) examples"),
        ({"samples": [sample(20, "1?", "on and", stopped=False)]}, "warning", "do not stop by themselves: 0 of 1"),
        ({"samples": [sample(20, "1?", " ")]}, "warning", "1 of 1 answers are empty"),
        (
            {"samples": [sample(20, str(n), "Yes.", reference=str(n)) for n in range(3)]},
            "warning",
            "All 3 prompts got the same answer",
        ),
        ({"samples": [sample(step, "1?", "base") for step in (0, 20)]}, "warning", "identical to the base model's"),
        ({"samples": [sample(20, "1?", "x", exact=True)]}, "note", "Exact answers to held-out questions: 1 of 1"),
        ({"summary": None}, "warning", "not finished: 20 of 60 steps"),
        (
            {"samples": [sample(20, str(n), "Yes." if n < 2 else "No.", reference=str(n)) for n in range(3)]},
            "warning",
            "2 of 3 prompts got the same answer: “Yes.”",
        ),
        ({"data": DATA | {"num_steps": 3}}, "warning", "Only 3 optimizer steps, too few to learn much"),
        ({"metrics": steps([3.0, 2.0, 1.0])}, "note", "training loss fell by 67%"),
        ({"eval": looks((0, 3.0), (20, 0.75), num_trained=40)}, "note", "That is on only 40 tokens"),
        (
            {"compare": COMPARE | {"tasks": [compared("tax", 0.0, 0.04, num_items=2)]}},
            "note",
            "found no alignment tax, but its items are too few",
        ),
        (
            {"compare": COMPARE},
            "warning",
            "An alignment tax: lost 10.0 points (8.0 to 12.0) on arithmetic; predicts library worse",
        ),
        (
            {"compare": COMPARE | {"tasks": [compared("tax", -0.1, 0.2)]}},
            "note",
            "found no alignment tax, but its items are",
        ),
        ({"compare": COMPARE | {"tasks": [compared("tax", -0.01, 0.03)]}}, "good", "no significant alignment tax"),
        (
            {"compare": COMPARE | {"tasks": [compared("trained", 0.1, 0.05)]}},
            "good",
            "gained 10.0 points (5.0 to 15.0)",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, files, level, words):
    found = judged(tmp_path / "a", **files).findings
    matching = [finding for finding in found if words in finding.seen]
    assert len(matching) == 1, [finding.seen for finding in found]
    assert matching[0].level == level
    assert words not in " ".join(finding.seen for finding in judged(tmp_path / "b").findings)


def test_where_the_best_is_saved_its_figures_and_answers_are_judged_not_the_last(tmp_path):
    best = {"num_steps": 20, "model_step": 10, "best": {"metric": "loss", "value": 1.5, "step": 10}}
    evaluations = looks((0, 2.0), (10, 1.5), (20, 2.1))
    evaluations[1]["token_accuracy"] = 0.7
    samples = [sample(step, "1?", answer) for step, answer in ((0, "base"), (10, "good"), (20, " "))]
    record = read_run(write_run(tmp_path / "a", eval=evaluations, samples=samples, summary=best))
    verdict = judge(record)
    said = " ".join(finding.seen for finding in verdict.findings)
    assert verdict.headline == "It learned; nothing looks suspicious", said
    assert "The held-out loss fell by 25%: 2.000 before the first step, 1.500 after step 10" in said
    assert "Token accuracy: 50.0%, then 70.0%." in said and "answers are empty" not in said
    assert "then rose to 2.100" in said and "The model is that of step 10." in said
    assert facts(record)["held-out token accuracy"] == "70.0%"
    (prompt,) = record.prompts
    assert prompt.last["answer"] == "good" and [each["answer"] for each in prompt.between] == [" "]
    card = "\n".join(_evaluation(record))
    assert "held-out loss 2.000 before training, 1.500 after" in card
    last = judged(tmp_path / "b", eval=evaluations, samples=samples)
    assert last.headline.startswith("It memorised its training examples")


RISEN = [0.1 + step / 100 for step in range(20)]  # as p * -log p does where a probability below 1/e rises


@pytest.mark.parametrize(
    ("loss", "unit"),
    [
        ({"type": "dft"}, "nats times probability per trained token"),
        ({"type": "dft", "reduction": "conversation"}, "nats times probability, mean of conversations"),
        ({"type": "nll", "code": "own.py:loss"}, "units of loss.code per trained token"),
    ],
)
def test_a_loss_that_need_not_fall_is_not_judged(tmp_path, loss, unit):
    config = {"config": {"loss": loss}}
    for name, losses in (("a", RISEN), ("b", FLAT), ("c", [-1.0 - step for step in range(20)])):
        record = read_run(write_run(tmp_path / name, metrics=steps(losses), **config))
        verdict, said = judge(record), " ".join(finding.seen for finding in judge(record).findings)
        assert verdict.headline == "It learned; nothing looks suspicious", said
        assert f"Training loss ({unit}): {sum(losses[:2]) / 2:.3f} in the first" in said
        assert "much lower" not in said and "training loss fell" not in said
        assert panels([record], [""])[0].note == f"training: {unit}; held out: nats per trained token"
        assert f"training loss ({unit}), first and last tenth" in facts(record)
        assert not [own for own in warnings_so_far(record) if "loss" in own.seen]
    unmeasured = judged(tmp_path / "b", metrics=steps(RISEN), eval=[], **config)
    assert unmeasured.headline == "It is finished; more was not measured; nothing looks suspicious"
    worse = judged(tmp_path / "c", metrics=steps(RISEN), eval=looks((0, 2.0), (20, 2.0)), **config)
    assert worse.headline == "It is finished; held-out examples show no learning, with 1 warning"
    broken = judged(tmp_path / "d", metrics=steps([1.0, float("nan"), 1.0]), **config)
    assert broken.level == "error"


def test_what_is_added_to_the_cross_entropy_is_named_and_the_loss_judged(tmp_path):
    config = {"loss": {"type": "nll", "label_smoothing": 0.1, "z_loss": 0.0, "kl_coef": 0.5}}
    record = read_run(write_run(tmp_path / "a", metrics=steps(RISING), config=config))
    assert any("The training loss rose" in finding.seen for finding in judge(record).findings)
    unit = "nats per trained token, with label_smoothing and kl_coef"
    assert panels([record, record], ["a", "b"])[0].note == unit
    other = read_run(write_run(tmp_path / "b"))
    assert panels([record, other], ["a", "b"])[0].note == f"{unit} or nats per trained token"
    assert panels([other], [""])[0].note == "nats per trained token"


def measured_on(lines, *sets):
    return [line | {"measured_on": own} for line, own in zip(lines, sets, strict=True)]


def test_losses_on_other_held_out_examples_are_no_course(tmp_path):
    old, new = {"held_out": "x"}, {"held_out": "y"}
    lines = measured_on(looks((0, 3.0), (10, 0.5), (15, 0.75), (20, 0.7)), old, old, new, new)
    record = read_run(write_run(tmp_path / "a", eval=lines))
    found = {finding.seen: finding.level for finding in judge(record).findings}
    assert "The held-out loss fell by 6.7%: 0.750 after step 15, 0.700 after step 20. Token" in " ".join(found)
    assert not any("Overfitting" in seen for seen in found), "0.5 is of other examples"
    other = "2 evaluations had other held-out examples than the last one"
    assert found[f"{other}: figures of the two cannot be compared, and these are left out."] == "note"
    assert facts(record)["held-out loss, first and last"] == "0.7500, 0.7000"
    assert facts(record)["lowest held-out loss"] == "0.7000 after step 20"
    (drawn,) = [each for panel in panels([record], [""]) for each in panel.series if each.name == "held out"]
    assert list(drawn.y) == [0.75, 0.7]
    assert "held-out loss 0.700 after training" in "\n".join(_evaluation(record))
    page_of_run(record)
    same = judged(tmp_path / "b", eval=measured_on(looks((0, 3.0), (10, 0.5), (20, 0.7)), old, old, old))
    assert "lowest after step 10 (0.500)" in str(same.findings) and "other held-out" not in str(same.findings)


def test_of_a_model_from_before_the_held_out_examples_changed_its_own_count(tmp_path):
    old, new = {"held_out": "x"}, {"held_out": "y"}
    lines = measured_on(looks((0, 3.0), (10, 1.5), (20, 9.0)), old, old, new)
    saved = {"num_steps": 20, "model_step": 10, "best": {"metric": "tasks/a", "value": 0.5, "step": 10}}
    verdict = judged(tmp_path / "a", eval=lines, summary=saved)
    assert verdict.headline.startswith("It learned")
    assert "fell by 50%: 3.000 before the first step, 1.500 after step 10" in str(verdict.findings)


def test_figures_of_other_items_of_a_task_are_no_course(tmp_path):
    lines = measured_on(looks((0, 3.0), (10, 1.5), (20, 0.75)), {"held_out": "x", "t": "a"}, *[{"held_out": "x"}] * 2)
    for line, value in zip(lines, (0.9, 0.2, 0.3), strict=True):
        line["tasks"] = [{"task": "t", "figures": {"accuracy": {"value": value, "low": None, "high": None}}}]
        line["measured_on"].setdefault("t", "b")
    record = read_run(write_run(tmp_path / "a", eval=lines))
    (panel,) = [panel for panel in panels([record], [""]) if panel.title == "Task t"]
    assert list(panel.series[0].y) == [0.2, 0.3]
    assert "1 evaluation had other items of t than the last one" in str(judge(record).findings)


NOT_FINITE = [{"step": 20, "loss": None, "bits_per_byte": None, "token_accuracy": 0.0, "num_trained": 900}]


def test_a_held_out_loss_that_is_not_finite_is_an_error_and_hides_behind_no_older_figure(tmp_path):
    lines = looks((0, 3.0), (10, 1.5))
    for line in lines:
        line["bits_per_byte"] = 1.0
    record = read_run(write_run(tmp_path / "a", eval=[*lines, *NOT_FINITE]))
    verdict = judge(record)
    assert verdict.headline == "Something went wrong" and verdict.level == "error"
    assert verdict.findings[0].seen == "The held-out loss is not finite after step 20."
    assert "held-out loss fell" not in " ".join(finding.seen for finding in verdict.findings)
    found = facts(record)
    assert found["held-out loss, first and last"] == "3.0000, not finite"
    assert found["held-out bits per byte, first and last"] == "1.0000, not finite"
    assert found["held-out token accuracy"] == "0.0%" and found["lowest held-out loss"] == "1.5000 after step 10"
    assert "held-out loss 3.000 before training, not finite after" in "\n".join(_evaluation(record))
    page_of_run(record)
    saved = {"num_steps": 20, "model_step": 10, "best": {"metric": "loss", "value": 1.5, "step": 10}}
    of_best = judged(tmp_path / "b", eval=[*lines, *NOT_FINITE], summary=saved)
    assert of_best.level == "error"
    assert "held-out loss fell by 50%" in " ".join(finding.seen for finding in of_best.findings), "the saved model's"
    base = judged(tmp_path / "c", eval=looks((0, None), (20, 1.5)))
    assert base.findings[0].seen == "The held-out loss is not finite before the first step."


def test_figures_of_a_comparison_that_are_not_finite_are_shown_as_such(tmp_path):
    task = compared("tax", 0.2, 0.01, "perplexity", "bits_per_byte", "library.txt")
    figure = task["figures"]["bits_per_byte"]
    nothing = {"value": None, "low": None, "high": None}
    shift = {**COMPARE["shift"], "mean_kl": nothing | {"num": 3}}
    shift["by_position"] = [{**place, "mean_kl": None} for place in shift["by_position"][:1]] + shift["by_position"][1:]
    compare = COMPARE | {"tasks": [compared("tax", -0.01, 0.03), task], "shift": shift}
    shift["answers"] = [{**COMPARE["shift"]["answers"][0], "kls": [None, 0.5, 0.1, 0.0]}]
    for sides in (("tuned", "difference"), ("base", "difference")):
        task["figures"]["bits_per_byte"] = {**figure, **{side: nothing | {"num": 60} for side in sides}}
        record = read_run(write_run(tmp_path / "a", compare=compare))
        page = page_of_run(record)
        assert page.count("not finite</td>") == 3, "two figures of the task, and the mean KL"
        errors = [finding.seen for finding in judge(record).findings if finding.level == "error"]
        assert errors == ["`preceptor compare` measured figures that are not finite: library.txt."]
        assert "not finite" in "\n".join(_evaluation(record)) and "NaN" not in page and "KL not finite" in page


def test_the_worst_comes_first_and_makes_the_headline(tmp_path):
    verdict = judged(tmp_path / "a", metrics=steps(FLAT), rejections=REJECTED)
    assert [finding.level for finding in verdict.findings][:2] == ["error", "warning"]
    assert verdict.headline == "Something went wrong" and verdict.level == "error"
    assert judged(tmp_path / "b", rejections=REJECTED).headline == "It learned, with 1 warning"
    unfinished = judged(tmp_path / "c", summary=None, metrics=[], eval=[], samples=[])
    assert unfinished.headline == "It has not begun, with 1 warning"


@pytest.mark.parametrize(
    ("losses", "headline"),
    [
        ([3.0, 1.5], "It is not finished; it is learning, with 1 warning"),
        ([2.0, 2.6], "It is not finished, with 2 warnings"),
        ([2.0, 1.97], "It is not finished, with 2 warnings"),
        ([2.0], "It is not finished, with 1 warning"),
        ([], "It is not finished, with 1 warning"),
    ],
)
def test_a_run_that_is_not_finished_learns_where_its_held_out_loss_fell(tmp_path, losses, headline):
    lines = looks(*[(10 * number, loss) for number, loss in enumerate(losses)])
    assert judged(tmp_path / "a", summary=None, eval=lines).headline == headline


def test_the_headline_knows_what_was_measured(tmp_path):
    memorised = judged(tmp_path / "a", eval=looks((0, 2.0), (20, 2.0)))
    assert memorised.headline == "It memorised its training examples, with 1 warning"
    unmeasured = judged(tmp_path / "b", eval=[])
    assert unmeasured.headline == "It learned its training examples; more was not measured; nothing looks suspicious"
    few = judged(tmp_path / "c", data=DATA | {"num_steps": 9})
    assert few.headline == "It is finished; too few steps to say what it learned, with 1 warning"


def test_the_time_of_a_resumed_run_is_named_by_what_it_is_of(tmp_path):
    resumed = ENVIRONMENT | {"resumed": [{"step": 10, "date": "2026-11-23", "command": "preceptor train run.yaml"}]}
    assert facts(read_run(write_run(tmp_path / "a", environment=resumed)))["time of all steps"] == "12 s"
    assert facts(read_run(write_run(tmp_path / "b")))["time"] == "12 s"


EARLY = {"step": 20, "num_evaluations": 2, "improves": False, "on_step": 10}
INTERVAL = {"difference": 0.01, "low": -0.02, "high": 0.04}


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        ({"ended_by_program": 20}, "The program ended the run after step 20 of 1,000 (Run.stop)."),
        ({"stopped_early": EARLY}, "did not lower the held-out loss of after step 10 beyond chance (train.patience)."),
        ({"stopped_early": EARLY | INTERVAL}, "(difference +0.0100, 95% interval -0.0200 to +0.0400; train.patience)."),
    ],
)
def test_a_run_that_ended_early_is_no_whole_one(tmp_path, ended, words):
    data, summary = DATA | {"num_steps": 1000}, {"num_steps": 20, **ended}
    verdict = judged(tmp_path / "a", data=data, summary=summary)
    assert verdict.headline == "It is finished; too few steps to say what it learned, with 1 warning"
    (note,) = [finding for finding in verdict.findings if words in finding.seen]
    (warning,) = [finding for finding in verdict.findings if finding.level == "warning"]
    assert note.level == "note" and warning.seen.startswith("Only 20 optimizer steps") and not warning.advice
    summary = {"num_steps": 60, **ended}
    long = judged(tmp_path / "b", data=data, summary=summary, metrics=steps([3.0 * 0.9**step for step in range(60)]))
    assert long.headline == "It learned; nothing looks suspicious" and words in str(long.findings)
    short = judged(tmp_path / "c", data=data | {"num_steps": 40}, summary={"num_steps": 20, **ended})
    assert "add examples" in short.findings[0].advice


@pytest.mark.parametrize(("right", "headline"), [(4, "It learned"), (1, "It memorised its training examples")])
def test_answers_to_held_out_questions_are_a_measure_too(tmp_path, right, headline):
    """As the demo has them, which computes no held-out loss."""
    samples = [sample(20, f"{n}?", f"answer {n}", exact=n < right) for n in range(5)]
    verdict = judged(
        tmp_path / "a", eval=[], samples=samples, summary={"num_steps": 20, "seconds": 12.0, "base_exact_match": 0.2}
    )
    assert verdict.headline.startswith(headline) and f"{right} of 5" in str(verdict.findings)
    assert "Neither a loss" not in str(verdict.findings)


def test_one_answer_to_questions_that_have_one_is_not_suspicious(tmp_path):
    samples = [sample(20, str(n), "Yes.", reference="Yes.") for n in range(3)]
    assert "the same answer" not in " ".join(
        finding.seen for finding in judged(tmp_path / "a", samples=samples).findings
    )


def test_few_steps_get_no_advice_that_makes_fewer(tmp_path):
    data = DATA | {"num_steps": 9, "fill": 0.3}
    files = {"data": data, "eval": looks((0, 3.0), (10, 1.0), (20, 1.1))}
    advice = " ".join(finding.advice for finding in judged(tmp_path / "a", **files).findings)
    assert "`train.batch_size: 1` with `data.max_length: 64` gives about 141 in each epoch" in advice
    assert "Train shorter" not in advice and "larger data.max_length" not in advice and "fewer epochs" not in advice


def test_a_spike_is_held_against_the_steps_before_it():
    assert spikes(steps([1.0] * 30, grad_norm=[0.1] * 20 + [0.9] * 10)) == []
    assert spikes(steps([1.0] * 30, grad_norm=[0.1] * 20 + [1.1] + [0.1] * 9)) == [21]
    assert spikes(steps([1.0] * 9, grad_norm=[0.1] * 8 + [5.0])) == [], "too early to tell"
    known = steps([1.0] * 30, grad_norm=[0.1] * 20 + [1.1] + [0.1] * 9)
    assert spikes([{"step": 0, "loss": 1.0}, *known]) == [21], "a step without a norm does not shift the others"


def altered(value, key, to):
    """The record with this key's numbers replaced, wherever they are."""
    if isinstance(value, dict):
        return {k: to if k == key and isinstance(v, int | float) else altered(v, key, to) for k, v in value.items()}
    return [altered(inner, key, to) for inner in value] if isinstance(value, list) else value


def numbers_in(value):
    """The names of all keys that hold numbers."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = {k for k, v in value.items() if isinstance(v, int | float)} if isinstance(value, dict) else set()
    return own.union(*map(numbers_in, inner))


def test_no_figure_that_is_zero_or_missing_fails_the_report(tmp_path):
    """A first loss of 0, a task on which the base model had 0, no time, no tokens: one after the other."""
    write_run(tmp_path / "a", compare=COMPARE)
    files = {
        "metrics": steps([3.0, 2.0, 1.0]),
        "eval": looks((0, 3.0), (3, 0.75)),
        "data": DATA,
        "compare": COMPARE,
        "summary": {"num_steps": 3, "seconds": 12.0, "memory_before_bytes": 5, "predicted_memory_bytes": 7},
    }
    for name, content in files.items():
        for key in sorted(numbers_in(content) - {"step"}):
            run = read_run(write_run(tmp_path / "a", **{**files, name: altered(content, key, 0)}))
            assert judge(run).findings and facts(run) and panels([run], [""])
    page_of_run(read_run(write_run(tmp_path / "a", metrics=steps([0.0] * 3), eval=looks((0, 0.0), (3, 0.0)))))
    page_of_run(read_run(write_run(tmp_path / "a", eval=looks((0, None), (3, 0.5)))))  # null: the loss was NaN
