"""`python -m pipeline evaluate RUN --stage 2_sft`: measure one stage on held-out data.

Writes RUN/evaluations/STAGE.json (metrics, answers to fixed prompts, traces) and STAGE.jsonl (one line per example,
from which the report computes paired differences between stages). The stage that others are compared with also gets
the baselines of `pipeline.evaluation.baselines`.

The data are those of the run's `evaluate.yaml`, and the held-out rows of the stages' own data (`settings`). Another
file is named by `--config`, other data by options. `--name` is the folder in RUN/evaluations for the result, beside the
run's own:

    python -m pipeline evaluate RUN --stage 1_pretrain --name shakespeare --text shakespeare.txt
    python -m pipeline evaluate RUN --stage 4_grpo --name gsm8k --problems gsm8k-test.jsonl --prompt_column question \\
        --grade math
"""

from __future__ import annotations

import argparse

OPTIONS = {
    "judge": "judge of the win rate: a reward model, votes, or package.module:function (default: the annotators)",
    "against": "stage that is the opponent in win_rate (default: the last instruction tuning)",
    "elicit": "what the answers of the baseline `elicited` begin with",
}
NUMBERS = {
    "limit": "use at most this many examples for each kind of measurement",
    "samples": "sampled answers per reasoning problem (default: 8)",
    "max_new_tokens": "length limit of an answer (default: that of the stages' settings, or 64)",
    "seed": "seed of the sampled answers and of the intervals",
}
DATA = {
    "text": "text to predict (bits_per_byte)",
    "instructions": "conversations, or questions with --completion_column (accuracy, or bits per byte of answers)",
    "problems": "problems with final answers (pass@k)",
    "prompts": "prompts (win_rate)",
    "pairs": "pairs of answers (reward_accuracy)",
}
COLUMNS = {
    "text_column": "column of --text (default: text)",
    "prompt_column": "column of problems, prompts and questions (default: prompt)",
    "completion_column": "column of the answers to instructions",
    "answer_column": "column of the final answers (default: answer)",
    "answer_pattern": "regular expression that finds the final answer in that column",
    "grade": "how answers are graded: exact, math, choice, code, another reward, or package.module:function",
    "system_prompt": "system message of prompts that have none",
    "dataset_config": "configuration of the data set, if it has several",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` to `parser`."""
    parser.add_argument("run", metavar="RUN", help="run directory, for instance runs/pocket")
    parser.add_argument("--stage", required=True, help="directory of the model inside RUN, for instance 2_sft")
    parser.add_argument("--config", metavar="FILE", help="evaluate.yaml to use instead of the run's own")
    parser.add_argument("--name", help="write to RUN/evaluations/NAME, beside the run's own figures")
    for name, meaning in OPTIONS.items():
        parser.add_argument(f"--{name}", help=meaning)
    for name, meaning in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=meaning)
    for name, meaning in DATA.items():
        names = [f"--{name}", *(["--reasoning"] if name == "problems" else [])]  # the option's earlier name
        parser.add_argument(*names, metavar="DATASET", help=f"{meaning}, instead of the run's")
    for name, meaning in COLUMNS.items():
        parser.add_argument(f"--{name}", help=meaning)
    parser.add_argument("--split", help="split of the data set (default: test; all of a plain file)")
    parser.add_argument("--lm_eval_tasks", nargs="+", metavar="TASK", help="tasks of lm-evaluation-harness")
    parser.add_argument("--vllm", action="store_true", default=None, help="sample answers with vLLM, on a GPU")
    parser.add_argument("--allow_unconfined_code", action="store_true", help="grade code even where it is not confined")


def main(args: argparse.Namespace) -> int:
    """Evaluate the stage, write both files and print the metrics. Returns the exit code.

    Raises:
        UserError: If the run, the stage, a setting or a data set cannot be used.
    """
    from pathlib import Path

    from pipeline.errors import UserError
    from pipeline.evaluation.held_out import read_held_out
    from pipeline.evaluation.results import check_own, format_table, write_result
    from pipeline.evaluation.settings import move, read_settings, with_layout, without_derived
    from pipeline.evaluation.stage import check_opponent, check_run, check_stage, evaluate_stage
    from pipeline.launch import quiet_libraries
    from pipeline.rewards.sandbox import run as sandbox

    quiet_libraries()
    sandbox.allow_unconfined = args.allow_unconfined_code
    run = Path(args.run)
    if args.lm_eval_tasks and not (args.name or args.config or any(getattr(args, key) for key in DATA)):
        args.name = "lm_eval"  # beside the run's own figures
    settings, problems = read_settings(args)
    problems += [] if args.name else check_own(run, args.stage, without_derived(settings))
    if problems:
        raise UserError(*problems)
    check_run(run)
    moved = with_layout(move(settings, run), run)
    check_stage(run, args.stage, moved, "--stage")
    if args.against:
        check_stage(run, args.against, moved, "--against")
    if moved["against"]:
        check_opponent(run, moved["against"])
    tasks = moved["lm_eval_tasks"]
    if tasks:
        from pipeline.evaluation.harness import check_tasks  # optional

        if problems := check_tasks(tasks, "--lm_eval_tasks" if args.lm_eval_tasks else "lm_eval_tasks"):
            raise UserError(*problems)
    flags = [name for name in DATA if getattr(args, name)]
    held_out = read_held_out(run, moved, flags, baselines=args.stage == moved["against"])
    folder = run / "evaluations" / (args.name or "")
    result = evaluate_stage(run, args.stage, held_out, moved, folder)
    result.settings = without_derived(settings)
    path = write_result(folder, result)
    if tasks:
        from pipeline.evaluation.harness import update_card

        update_card(run / args.stage, result)
    print(format_table(result))
    print(f"{path} ({result.seconds:.1f} s)")
    return 0
