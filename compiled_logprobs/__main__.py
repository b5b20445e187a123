"""`python -m compiled_logprobs` is `compiled-logprobs`."""

from compiled_logprobs.cli import main

main()
