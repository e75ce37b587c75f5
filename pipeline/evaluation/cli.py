"""`python -m pipeline evaluate RUN --stage 2_sft`: measure one stage on the held-out data of the run.

Writes RUN/evaluations/STAGE.json (metrics, answers to ten fixed prompts, traces) and STAGE.jsonl (one line per example,
from which the report computes paired differences between stages). The stage that others are compared with also gets
the baselines of `pipeline.evaluation.baselines`. Other data can be given by options alone:

    python -m pipeline evaluate RUN --stage 1_pretrain --text shakespeare.txt
    python -m pipeline evaluate RUN --stage 4_grpo --reasoning gsm8k-test.jsonl --prompt_column question \\
        --answer_pattern '#### (.+)'
"""

from __future__ import annotations

import argparse

AGAINST = "2_sft"
MAX_SAMPLES = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate` to `parser`."""
    parser.add_argument("run", metavar="RUN", help="run directory, for instance runs/pocket")
    parser.add_argument("--stage", required=True, help="directory of the model inside RUN, for instance 2_sft")
    parser.add_argument("--against", default=AGAINST, help="stage that is the opponent in win_rate (default: 2_sft)")
    parser.add_argument("--limit", type=int, help="use at most this many examples for each kind of measurement")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampled answers and of the intervals")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length limit of an answer (default: 64)")
    parser.add_argument("--samples", type=int, default=8, help="sampled answers per reasoning problem (default: 8)")
    parser.add_argument("--text", metavar="DATASET", help="text to predict, instead of the run's (bits_per_byte)")
    parser.add_argument("--text_column", default="text", help="its column (default: text)")
    parser.add_argument(
        "--reasoning", metavar="DATASET", help="problems with final answers, instead of the run's (pass@k)"
    )
    parser.add_argument("--prompt_column", default="prompt", help="its column of problems (default: prompt)")
    parser.add_argument("--answer_column", default="answer", help="its column of answers (default: answer)")
    parser.add_argument("--answer_pattern", help="regular expression that finds the final answer in that column")
    parser.add_argument("--config", help="configuration of --text or --reasoning, if the data set has several")
    parser.add_argument("--allow_unconfined_code", action="store_true", help="grade code even where it is not confined")
    parser.add_argument("--split", help="its split (default: test; all of a plain file)")


def main(args: argparse.Namespace) -> int:
    """Evaluate the stage, write both files and print the metrics. Returns the exit code.

    Raises:
        UserError: If the run, the stage or a data set cannot be used.
    """
    from dataclasses import replace
    from pathlib import Path

    from pipeline.config.checks import check_ranges
    from pipeline.errors import Problem, UserError
    from pipeline.evaluation.held_out import read_held_out
    from pipeline.evaluation.results import format_table, write_result
    from pipeline.evaluation.stage import check_opponent, check_run, check_stage, evaluate_stage
    from pipeline.rewards.sandbox import run as sandbox

    sandbox.allow_unconfined = args.allow_unconfined_code
    run = Path(args.run)
    problems = check_ranges(vars(args))
    if args.samples > MAX_SAMPLES:
        problems.append(Problem("samples", args.samples, f"must be at most {MAX_SAMPLES}"))
    if problems:
        raise UserError(*(replace(problem, field=f"--{problem.field}") for problem in problems))
    check_run(run)
    check_stage(run, args.stage, "--stage")
    if args.against != AGAINST:
        check_stage(run, args.against, "--against")
    check_opponent(run, args.against)
    held_out = read_held_out(run, args)
    result = evaluate_stage(
        run,
        args.stage,
        held_out,
        against=args.against,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
    )
    path = write_result(run, result)
    print(format_table(result))
    print(f"{path} ({result.seconds:.1f} s)")
    return 0
