"""Flags of runs of seconds."""

SWEEP = [
    "--config=configs/isoflop.py:tiny",
    "--config.plan.widths=(8, 12, 16, 20)",
    "--config.plan.budgets=(5e8, 1e9)",
    "--config.plan.least_steps=10",
    "--config.plan.tokens_per_parameter=(0.1, 1e4)",
    "--config.plan.warmup=4",
    "--config.train.eval_tokens=4096",
    "--config.train.noise_batches=2",
    "--config.report.resamples=20",
]
TRAIN = [
    "--config=configs/lm.py:tiny",
    "--config.batch_size=8",
    "--config.length=16",
    "--config.model.layers=2",
    "--config.model.width=16",
    "--config.model.heads=4",
    "--config.model.kv_heads=4",
    "--config.optimizer.warmup=2",
    "--config.log.every=10",
    "--config.eval.batches=2",
    "--config.data.max_bytes=200000",
    "--config.plan=dp=2",
]
