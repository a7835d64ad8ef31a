"""A step of which only the sizes are known."""

from bertjax.planning.step import StepFacts

FACTS = StepFacts(
  mesh=dict(data=8, fsdp=1, model=1, seq=1),
  batch_size=64,
  seq_len=10,
  vocab_size=50,
  parameters=1000,
  parameter_bytes=4_000,
  optimizer_bytes=8_000,
  batch_bytes=640,
  model_flops=4e9,
)
