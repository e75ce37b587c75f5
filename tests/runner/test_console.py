"""What a person sees of a run: in a terminal, whose screen is rebuilt from what is written to it, and elsewhere."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyte
import pytest
import yaml

from pipeline.progress import VARIABLE, Tally, report_progress, time_in_words
from pipeline.runner import console as view
from pipeline.runner.console import MAX_COLUMNS, RunConsole, is_live
from pipeline.runner.due import Decision
from pipeline.runner.run_state import RunState
from pipeline.runner.session import conclusion
from pipeline.runner.steps import Step
from tests.helpers.stand_in_run import end, start

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
STAGES = ("0_data", "0_random", "1_pretrain", "2_sft")
CLEAN = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "TERM")}
CLEAN["PYTHONIOENCODING"] = "utf-8"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipe folder `recipe` in the current directory; the run lies in `runs/r`."""
    monkeypatch.chdir(tmp_path)
    Path("accelerate_config.yaml").write_text((ROOT / "accelerate_config.yaml").read_text())
    configure("0_data", output_dir="runs/r/data")
    configure("1_pretrain", output_dir="runs/r/1_pretrain", dataset_name="runs/r/data")
    configure("2_sft", output_dir="runs/r/2_sft", model_name_or_path="runs/r/1_pretrain", dataset_name="runs/r/data")
    return tmp_path


def configure(name: str, **values: object) -> None:
    """Change fields of a step's YAML file."""
    path = Path("recipe", f"{name}.yaml")
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({**(yaml.safe_load(path.read_text()) if path.exists() else {}), **values}))


def environment(**more: str) -> dict[str, str]:
    return {**CLEAN, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", **more}


@dataclass
class Terminal:
    """A run in a pseudo-terminal.

    Attributes:
        process: The run.
        screen: What its user sees.
        descriptor: The user's side of the terminal.
        theirs: The run's side.
        written: All that was written to the terminal.
    """

    process: BaseProcess
    screen: pyte.Screen
    descriptor: int
    theirs: int
    written: bytes = b""
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        stream = pyte.ByteStream(self.screen)
        while True:
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:
                # The run has ended.
                return
            self.written += data
            stream.feed(data)

    def lines(self) -> list[str]:
        """Return the lines on the screen, without the empty ones."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, pattern: str) -> None:
        """Wait until something is on the screen."""
        deadline = time.monotonic() + 60
        while True:
            # What the run wrote last may be read after it has ended.
            more = self._reader.is_alive()
            if re.search(pattern, "\n".join(self.lines())):
                return
            assert more and time.monotonic() < deadline, "\n".join(self.lines())
            time.sleep(0.02)

    def end(self) -> int:
        """Wait until the run has ended. Return its exit code."""
        code = end(self.process)
        # Nobody else holds the run's side of the terminal any more: the reader comes to its end.
        os.close(self.theirs)
        self._reader.join(timeout=10)
        os.close(self.descriptor)
        return code


def terminal(*arguments: str, columns: int = 80, rows: int = 40) -> Terminal:
    """Start a run in a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    variables = environment(TERM="xterm-256color")
    process = start("recipe", *arguments, environment=variables, terminal=os.ttyname(theirs))
    return Terminal(process, pyte.Screen(columns, rows), ours, theirs)


def in_file(*arguments: str) -> tuple[int, str, str]:
    """Run without a terminal. Return the exit code, and what was written to stdout and stderr."""
    code = end(start("recipe", *arguments, environment=environment()))
    return code, Path("out").read_text(), Path("err").read_text()


def widest(written: bytes) -> int:
    """Return the length of the longest line that was written, without control sequences."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())
    return max(map(len, re.split(r"[\r\n]+", text)))


@pytest.mark.parametrize("columns", [80, 160])
def test_a_terminal_shows_the_stages_and_nothing_is_left_over(columns: int) -> None:
    configure("2_sft", prints=100, reports=20)
    run = terminal(columns=columns)
    run.wait_for(r"▸  2_sft .* ([5-9]|1\d)/20  loss 0\.5 .* left\n.* so far, about .* left\n")
    assert "output: runs/r/logs/2_sft.log" in run.lines()
    assert run.screen.cursor.hidden
    assert run.end() == 0
    assert run.lines()[0] == "recipe, in runs/r"
    assert [line.split()[:2] for line in run.lines()[1:-1]] == [["✓", name] for name in STAGES]
    assert re.fullmatch(r"4 steps in [\d.]+ s", run.lines()[-1])
    assert widest(run.written) <= min(columns, MAX_COLUMNS), "a time does not stand far from its name"
    assert not run.screen.cursor.hidden
    second_run = terminal(columns=columns)
    assert second_run.end() == 0
    assert [line.split() for line in second_run.lines()[1:-1]] == [["=", name, "kept"] for name in STAGES]
    assert second_run.lines()[-1] == "nothing to do: all steps had finished"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_kept_and_how_to_go_on(number: signal.Signals) -> None:
    configure("2_sft", waits=True)
    run = terminal()
    run.wait_for("▸  2_sft")
    while not Path("runs/r/2_sft/pid").exists():
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.write(run.descriptor, b"\x03")
    else:
        os.kill(run.process.pid, number)
    assert run.end() == 128 + number
    assert run.lines()[-3:] == [
        f"2_sft was stopped by {number.name}",
        "kept: the steps before it",
        "to resume: fourstage run recipe",
    ]
    assert run.lines()[4].startswith("✗  2_sft") and len(run.lines()) == 8
    assert not run.screen.cursor.hidden
    second_run = terminal()
    second_run.wait_for("✓  2_sft")
    assert second_run.end() == 0
    assert [line.split()[0] for line in second_run.lines()[1:5]] == ["=", "=", "=", "✓"]


def test_a_step_saves_when_its_terminal_is_closed() -> None:
    configure("2_sft", waits=True)
    run = terminal()
    run.wait_for("▸  2_sft")
    while not Path("runs/r/2_sft/pid").exists():
        time.sleep(0.02)
    os.close(run.descriptor)
    os.close(run.theirs)
    assert end(run.process) == 128 + signal.SIGHUP
    assert Path("runs/r/2_sft/checkpoint").read_text() == str(int(signal.SIGHUP))
    record = json.loads(Path("runs/r/run.json").read_text())["steps"]["2_sft"]
    assert record["finished_at"] is None and record["seconds"] > 0


@pytest.mark.parametrize(("code", "shown"), [(7, 20), (2, 51)])
def test_a_failed_step_shows_its_last_lines_and_a_refusal_all(code: int, shown: int) -> None:
    configure("2_sft", prints=50, fails=code)
    run = terminal(rows=80)
    assert run.end() == code
    lines = run.lines()
    assert lines[4].startswith("✗  2_sft")
    assert lines[5 : 5 + shown] == [*(f"line {number}" for number in range(50)), "the step's own message"][-shown:]
    assert lines[-3] == f"2_sft failed with exit code {code}; the steps before it are kept"
    assert lines[-1] == "its whole output: runs/r/logs/2_sft.log"
    assert not run.screen.cursor.hidden


def test_a_terminal_without_unicode_shows_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLEAN, "PYTHONIOENCODING", "ascii")
    run = terminal()
    assert run.end() == 0
    assert b"\x1b" not in run.written and "[4/4] 2_sft: has not run yet" in run.lines()


def test_a_plain_terminal_shows_what_a_pipe_does() -> None:
    run = terminal("--plain", columns=160)
    assert run.end() == 0
    assert b"\x1b" not in run.written and b"\r" not in run.written.replace(b"\r\n", b"\n")
    expected = [
        line for _ in STAGES for line in (": has not run yet", "$ python -m tests.helpers.stand_in_step", "    done in")
    ]
    assert len(run.lines()) == len(expected) + 1
    assert all(part in line for part, line in zip(expected, run.lines(), strict=False))


@pytest.mark.parametrize(
    ("variables", "options", "live"),
    [
        ({}, {}, True),
        ({"TERM": "dumb"}, {}, False),
        ({"TERM": "unknown"}, {}, False),
        ({"CI": "true"}, {}, False),
        ({"NO_COLOR": "1"}, {}, False),
        ({"NO_COLOR": ""}, {}, True),
        ({}, {"plain": True}, False),
        ({}, {"verbose": True}, False),
    ],
)
def test_where_the_view_is_live(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], options: dict[str, bool], live: bool
) -> None:
    for name in ("CI", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert is_live(**options) is live
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not is_live(**options)


def test_a_resumed_step_appends_to_its_log_and_a_new_start_replaces_it() -> None:
    log = Path("runs/r/logs/2_sft.log")
    configure("2_sft", fails=7)
    in_file()
    first = log.read_text()
    assert first == "$ python -m tests.helpers.stand_in_step --config recipe/2_sft.yaml\nthe step's own message\n"
    in_file()
    assert log.read_text() == first + first.splitlines()[0] + "\n"
    configure("2_sft", prints=1, fails=0)
    in_file()
    assert log.read_text() == first.splitlines()[0] + "\nline 0\n"
    assert sorted(path.name for path in log.parent.iterdir()) == sorted(f"{name}.log" for name in STAGES)


def test_verbose_prints_all_output_once_as_well() -> None:
    configure("1_pretrain", prints=30)
    configure("2_sft", fails=7)
    _, out, err = in_file("--verbose")
    assert [line for line in out.splitlines() if line.startswith("line ")] == [f"line {n}" for n in range(30)] * 2
    assert (out + err).count("the step's own message") == 1
    assert Path("runs/r/logs/1_pretrain.log").read_text().count("line ") == 30


def test_a_file_where_the_logs_belong_is_refused_before_anything_is_written() -> None:
    Path("runs/r").mkdir(parents=True)
    Path("runs/r/logs").touch()
    code, _, err = in_file()
    assert code == 2 and err.startswith("output_dir: runs/r/logs: is not a directory")
    assert [path.name for path in Path("runs/r").iterdir()] == ["logs"]


STEPS = [
    Step(name, kind, (), Path("runs/r", name))
    for name, kind in (("0_random", "random"), ("1_pretrain", "pretrain"), ("2_sft", "sft"), ("3_ppo", "ppo"))
]
TODO = [(step, Decision("start", "has not run yet", "")) for step in STEPS]


def test_the_main_figure_of_a_stage_is_shown() -> None:
    Path("runs/r/evaluations").mkdir(parents=True)
    for name, metric, value in (("0_random", "bits_per_byte", 2.6438), ("2_sft", "instruction_accuracy", 0.93)):
        content = {"metrics": {metric: {"value": value}, "step_rate": {"value": 0.5}}}
        Path(f"runs/r/evaluations/{name}.json").write_text(json.dumps(content))
    Path("runs/r/evaluations/3_ppo.json").write_text("{")
    state = RunState(Path("runs/r"), STEPS, TODO, {})
    # 1_pretrain was not evaluated, 2_sft starts from it, and the file of 3_ppo is damaged.
    assert [state.main_metric(step.name) for step in STEPS] == [
        "bits per byte 2.644",
        "",
        "instruction accuracy 0.930",
        "",
    ]


def test_without_grades_a_stage_is_judged_by_the_likelihood_of_answers() -> None:
    state = RunState(Path("runs/r"), STEPS, TODO, {})
    path = Path("runs/r/evaluations/2_sft.json")
    assert state.main_metric("2_sft") == ""
    path.parent.mkdir(parents=True)
    ungraded = {"stop_rate": {"value": 0.5}, "answer_bits_per_byte": {"value": 1.25}}
    path.write_text(json.dumps({"metrics": ungraded}))
    assert state.main_metric("2_sft") == "bits per byte of answers 1.250"
    path.write_text(json.dumps({"metrics": ungraded | {"instruction_accuracy": {"value": 0.25}}}))
    assert state.main_metric("2_sft") == "instruction accuracy 0.250"


def test_answers_and_votes_are_counted_and_a_run_that_waits_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = Step("evaluate_2_sft", "evaluate", (), Path("runs/r"), leftovers=(Path("runs/r/2_sft.json"),))
    votes = Step("3_votes", "votes", (), Path("runs/r/votes"))
    steps = [STEPS[2], measure, votes]
    state = RunState(Path("runs/r"), steps, [(step, TODO[0][1]) for step in steps], {})
    state.start(STEPS[2])
    state.end(STEPS[2], 77.0, finished=True)
    reports = Path("reports")
    reports.touch()
    monkeypatch.setenv(VARIABLE, str(reports))
    monkeypatch.delenv("RANK", raising=False)
    tally = Tally("answers")
    tally.add(10)
    assert reports.read_text() == "", "how many there will be is not known yet"
    tally.total = 400
    tally.add(110)
    state.start(measure)
    state.progress.update(json.loads(reports.read_text()))
    assert state.doing == "measuring 110 of 400 answers"
    tally.add(1000)
    assert json.loads(reports.read_text().splitlines()[-1])["done"] == 400
    state.end(measure, 6.0, finished=True)
    state.start(votes)
    state.progress.update({"done": 0, "total": 12, "unit": "votes"})
    state.end(votes, 1.0, finished=False, for_people=True)
    console = RunConsole("recipe", state, began=0.0, plain=True)
    console._console.width = 160
    console._console.print(console._view())
    _, sft, waiting = (line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert sft.startswith("✓  2_sft") and sft.endswith("1 min 23 s") and len(sft) <= MAX_COLUMNS
    assert waiting == "⏸  3_votes  waits for 12 votes"
    state.progress.update({"done": 5, "total": 12})
    assert state.awaited == "waits for 7 more votes"


def test_the_time_left_is_that_of_an_earlier_run_at_the_speed_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    earlier_seconds = {"0_random": 2.0, "1_pretrain": 10.0, "2_sft": 20.0, "3_ppo": 40.0}
    state = RunState(Path("runs/r"), STEPS, TODO, earlier_seconds)
    assert state.seconds_left() == (None, 72.0)
    # The first step takes 4 s instead of 2 s, so the others are expected to take 2 * (10 + 20 + 40) s.
    state.start(STEPS[0])
    state.end(STEPS[0], 4.0, finished=True)
    assert state.seconds_left()[1] == 140.0
    state.start(STEPS[1])
    state.progress.update({"done": 0, "total": 100})
    now = 10.0
    state.progress.update({"done": 1, "total": 100})
    assert state.seconds_left()[0] == 10.0, "the first update compiles and says nothing about the others"
    # 50 updates in 10 s: the other 49 take 9.8 s, and the step 29.8 s. So the steps that were expected to take 2 s and
    # 10 s take 4 s and 29.8 s, and the last two, with 60 s, are slowed down alike.
    now = 20.0
    state.progress.update({"done": 51, "total": 100})
    assert state.seconds_left() == (pytest.approx(9.8), pytest.approx(9.8 + 60 * (4 + 29.8) / 12))


def test_a_first_run_has_no_time_left_until_a_training_shows_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    state = RunState(Path("runs/r"), STEPS, TODO, {})
    assert state.seconds_left() == (None, None)
    state.start(STEPS[0])
    state.end(STEPS[0], 4.0, finished=True)
    assert state.seconds_left() == (None, None), "random weights say nothing about trainings"


def test_a_resumed_step_goes_at_the_speed_of_its_new_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    state = RunState(Path("runs/r"), STEPS, [(STEPS[0], Decision("resume", "was interrupted", ""))], {})
    state.start(STEPS[0])
    state.progress.update({"done": 79, "total": 100})
    state.progress.update({"done": 80, "total": 100})
    now = 5.0
    state.progress.update({"done": 90, "total": 100})
    assert state.seconds_left()[0] == 5.0


def test_a_file_gets_a_line_for_each_quarter_of_a_step() -> None:
    configure("2_sft", reports=40)
    assert end(start("recipe", environment=environment())) == 0
    out = Path("out").read_text()
    done = re.findall(r"^    (\d+)/40, loss 0.5, .* left of the run$", out, re.MULTILINE)
    quarters = [4 * int(number) // 40 for number in done]
    assert len(quarters) >= 2 and quarters == sorted({1, 2, 3} & set(quarters)), "each at most once"
    assert "\r" not in out and "\x1b" not in out


def test_without_a_terminal_a_step_prints_a_line_for_each_quarter(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(view, "REFRESH_SECONDS", 0.01)
    monkeypatch.setattr(view, "PROGRESS_SECONDS", 0)
    monkeypatch.delenv("RANK", raising=False)
    state = RunState(Path("runs/r"), STEPS, TODO, {})
    console = RunConsole("recipe", state, began=0.0, plain=True)
    with console.step(STEPS[1], "a command", resumes=False) as (_, variables):
        monkeypatch.setenv(VARIABLE, variables[VARIABLE])
        for number in range(41):
            report_progress(done=number, total=40, loss=0.5, tokens_per_second=12063)
            time.sleep(0.05)
    line = r"    (\d+)/40, loss 0.5, 12,063 tokens/s, [^,]+ left, [^,]+ left of the run"
    matches = [re.fullmatch(line, printed) for printed in capsys.readouterr().out.splitlines()]
    quarters = [4 * int(match[1]) // 40 for match in matches if match]
    assert len(quarters) == len(matches) >= 2 and quarters == sorted({1, 2, 3} & set(quarters)), "each at most once"


def test_what_is_kept_of_a_stopped_run() -> None:
    state = RunState(Path("runs/r"), STEPS, TODO, {})
    state.start(STEPS[2])
    assert state.describe_kept(STEPS[2], 130) == "the steps before it"
    state.progress.update({"done": 120, "total": 296})
    assert state.describe_kept(STEPS[2], 137) == "the steps before it, and its last checkpoint, if any"
    state.progress.update({"stopping": "SIGINT"})
    assert state.describe_kept(STEPS[2], 130) == "2_sft up to 120 of 296, and the steps before it"
    assert state.describe_kept(STEPS[2], 137) == "the steps before it, and its last checkpoint, if any"
    assert state.describe_kept(STEPS[2], 0) == "2_sft, which had finished, and the steps before it"


def test_only_the_first_process_reports_and_one_without_a_runner_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = tmp_path / "reports"
    monkeypatch.delenv("RANK", raising=False)
    report_progress(done=1, total=2)
    monkeypatch.setenv(VARIABLE, str(reports))
    report_progress(done=1, total=2)
    assert not reports.exists(), "the runner has gone"
    reports.touch()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        report_progress(done=1, total=2, reward=0.5)
    assert [json.loads(line) for line in reports.read_text().splitlines()] == [{"done": 1, "total": 2, "reward": 0.5}]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0.4 s"), (48.2, "48 s"), (59.7, "1 min 0 s"), (77, "1 min 17 s"), (725, "12 min 5 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert time_in_words(seconds) == shown


@pytest.mark.parametrize(
    ("kept", "said"),
    [([], ""), ([True, True], ", all 2 promises kept"), ([True, False], ", 1 of 2 promised figures fall short")],
)
def test_the_last_line_says_whether_promises_were_kept(kept: list[bool], said: str, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({"promises": [{"promise": "a figure", "kept": value} for value in kept]}))
    report = tmp_path / "index.html"
    assert conclusion(report) == [f"report: {report}{said}"]


def test_the_last_lines_are_the_verdict(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.json"
    finding = {"stage": "4_grpo", "what": "all rewards were equal", "value": 1.0, "remedy": "take easier problems"}
    metrics.write_text(json.dumps({"verdict": [finding], "conclusion": "1 thing did not work, in 4_grpo"}))
    report = tmp_path / "index.html"
    assert "\n".join(conclusion(report)).split("\n")[1:] == [
        "what did not work:",
        "  4_grpo: all rewards were equal",
        "    take easier problems",
    ]
    metrics.write_text(json.dumps({"verdict": [], "conclusion": "All four stages did what they are for"}))
    assert conclusion(report)[1:] == ["All four stages did what they are for"]


def test_few_rows_are_named_and_two_reward_models_are_not_compared() -> None:
    Path("runs/r/evaluations").mkdir(parents=True)
    for name, value, n in (("3_reward", 0.5, 200), ("3_reward_judge", 1.0, 1)):
        metrics = {"reward_accuracy": {"value": value, "n": n}}
        Path(f"runs/r/evaluations/{name}.json").write_text(json.dumps({"metrics": metrics}))
    models = [Step(name, "reward", (), Path("runs/r", name)) for name in ("3_reward", "3_reward_judge")]
    todo = [(step, TODO[0][1]) for step in models]
    state = RunState(Path("runs/r"), models, todo, {})
    assert [state.main_metric(step.name) for step in models] == [
        "reward accuracy 0.500",
        "reward accuracy 1.000 (n = 1)",
    ]
    assert (
        RunState(Path("runs/r"), models, todo, {}, is_smoke=True).main_metric("3_reward_judge")
        == "reward accuracy 1.000"
    )


def test_preference_tuning_shows_right_answers_if_the_grader_preferred_them() -> None:
    Path("runs/r/evaluations").mkdir(parents=True)
    for name, value in (("2_sft", 0.27), ("3_ppo", 0.54)):
        Path(f"runs/r/evaluations/{name}.json").write_text(json.dumps({"metrics": {"pass@1": {"value": value}}}))
    sft = Step("2_sft", "sft", (), Path("runs/r/2_sft"))
    values = {"reward_funcs": ["reasoning_gym"]}
    ppo = Step("3_ppo", "ppo", (), Path("runs/r/3_ppo"), values=values, needs=("2_sft",))
    file = Path("runs/r/evaluations/3_ppo.json")
    problems = {"problems": {"grade": "reasoning_gym"}}
    evaluation = Step("evaluate_3_ppo", "evaluate", (), file.parent, (file,), values=problems)
    state = RunState(Path("runs/r"), [sft, ppo, evaluation], [], {})
    assert state.main_metric("3_ppo") == "pass@1 0.270 -> 0.540"


def test_a_figure_is_shown_against_the_stage_before_that_has_it() -> None:
    Path("runs/r/evaluations").mkdir(parents=True)
    figures = {
        "0_random": {"bits_per_byte": 2.6438, "instruction_accuracy": 0.0},
        "1_pretrain": {"bits_per_byte": 0.194, "instruction_accuracy": 0.02},
        "1_pretrain_dense": {"bits_per_byte": 0.2, "instruction_accuracy": 0.01},
        "2_sft": {"instruction_accuracy": 0.93},
    }
    for name, values in figures.items():
        metrics = {metric: {"value": value} for metric, value in values.items()}
        Path(f"runs/r/evaluations/{name}.json").write_text(json.dumps({"metrics": metrics}))
    Path("runs/r/evaluations/3_ppo.json").write_text("{")
    twin = Step("1_pretrain_dense", "pretrain", (), Path("runs/r/1_pretrain_dense"))
    steps = [*STEPS[:2], twin, replace(STEPS[2], needs=("0_data", "1_pretrain")), STEPS[3]]
    steps.append(Step("evaluate_2_sft", "evaluate", (), Path("runs/r"), (Path("runs/r/evaluations/2_sft.json"),)))
    state = RunState(Path("runs/r"), steps, TODO, {})
    assert state.main_metric("0_random") == "bits per byte 2.644"
    assert state.main_metric("1_pretrain") == "bits per byte 2.644 -> 0.194"
    assert state.main_metric("1_pretrain_dense") == "bits per byte 2.644 -> 0.200", "it starts where the first one does"
    assert state.main_metric("2_sft") == "instruction accuracy 0.020 -> 0.930", "which starts from the first"
    assert state.main_metric("3_ppo") == ""


def test_two_ways_to_tune_one_model_are_shown_against_it() -> None:
    Path("runs/r/evaluations").mkdir(parents=True)
    for name, value in (("2_sft", 0.5), ("3_ppo", 0.75), ("3_dpo", 0.625)):
        metrics = {"win_rate": {"value": value}}
        Path(f"runs/r/evaluations/{name}.json").write_text(json.dumps({"metrics": metrics}))
    tuned = [Step(f"3_{kind}", kind, (), Path("runs/r", f"3_{kind}"), needs=("2_sft",)) for kind in ("ppo", "dpo")]
    steps = [*STEPS[:3], *tuned]
    state = RunState(Path("runs/r"), steps, [(step, TODO[0][1]) for step in steps], {})
    assert [state.main_metric(step.name) for step in tuned] == ["win rate 0.500 -> 0.750", "win rate 0.500 -> 0.625"]
