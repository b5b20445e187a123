"""How fast is it? Time the candidates of a problem in a process of their own, and decide between them."""
