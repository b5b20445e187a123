"""Every wrong function and every right one, over many seeds: what is too long for CI, and run before a release.

    python -m tests.helpers.check_many_seeds --wrong 5 --right 10 --right-wide 3

It prints a line for what should not be, and the counts at the end.
"""

import argparse
import sys
import time

import torch

import compiled_logprobs as clp
from tests.helpers.functions_to_check import RIGHT_FUNCTIONS, WRONG_FUNCTIONS
from tests.helpers.reported_functions import REPORTED_FUNCTIONS

VOCABULARIES = (32771, 32000)
WIDE = 151936


def wrong_ones(seeds: int) -> tuple[int, int]:
    """How many were stopped with their own reason and cause, of how many."""
    stopped = count = 0
    for wrong in (*WRONG_FUNCTIONS, *REPORTED_FUNCTIONS):
        for seed in range(seeds):
            report = clp.check_backend(wrong.function, wrong.problem, seed=seed)
            right = wrong.reason in report.reasons and bool(report.causes) and report.causes[0].startswith(wrong.cause)
            stopped, count = stopped + right, count + 1
            if not right:
                print(f"not as it should be, seed {seed}: {wrong.reason}: {wrong.cause}: {report}", flush=True)
    return stopped, count


def right_ones(vocab: int, seeds: int, named: str) -> tuple[int, int]:
    """How many passed with the default inputs of this vocabulary, of how many."""
    passed = count = 0
    for right in RIGHT_FUNCTIONS:
        if named and right.__name__ != named:
            continue
        for seed in range(seeds):
            report = clp.check_backend(right, vocab=vocab, seed=seed)
            passed, count = passed + report.passed, count + 1
            if not report.passed:
                failed = [check.detail for check in report.checks if not check.passed]
                print(f"stopped, seed {seed}, V = {vocab}: {report}: {failed}", flush=True)
    return passed, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wrong", type=int, default=5, help="seeds for each wrong function")
    parser.add_argument("--right", type=int, default=10, help=f"seeds for each right one at V = {VOCABULARIES}")
    parser.add_argument("--right-wide", type=int, default=3, help=f"seeds for each right one at V = {WIDE}")
    parser.add_argument("--named", default="", help="of the right ones, this alone")
    given = parser.parse_args()
    started = time.monotonic()
    stopped, wrong = wrong_ones(given.wrong)
    print(f"{stopped} of {wrong} wrong ones stopped, with their causes", flush=True)
    passed, right = 0, 0
    for vocab, seeds in ((VOCABULARIES[0], given.right), (VOCABULARIES[1], given.right), (WIDE, given.right_wide)):
        of_vocab, count = right_ones(vocab, seeds, given.named)
        passed, right = passed + of_vocab, right + count
        print(f"V = {vocab}: {of_vocab} of {count} right ones passed", flush=True)
    print(f"torch {torch.__version__}, {time.monotonic() - started:.0f} s")
    sys.exit(stopped < wrong or passed < right)


if __name__ == "__main__":
    main()
