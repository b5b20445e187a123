"""`python -m compiled_logprobs` is `compiled-logprobs`."""

from compiled_logprobs.cli.main import main

main()
