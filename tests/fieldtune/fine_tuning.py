"""How little demonstration and fine-tuning the whole runs on the toy backend begin with."""

FINE_TUNING = ("trainer.demos.per_task=20", "trainer.sft.steps=60")
