"""The dashboard: which backend to use for a shape, whether it is right, what it costs; and profile runs from the
browser.

`compiled-logprobs dashboard` starts it. It imports the library; nothing of the library but the command line knows of
it.
"""
