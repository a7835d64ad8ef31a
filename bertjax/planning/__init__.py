"""What `python -m bertjax.plan` compiles and prints."""
