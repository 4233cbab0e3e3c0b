"""
Where else a run's metrics go, when asked: TensorBoard, W&B.
"""

import os


def start(name, out_dir, config):
    """Two functions for TensorBoard or W&B: write(step, metrics) and finish()."""
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out_dir)
        add = lambda step, row: [writer.add_scalar(key, value, step) for key, value in row.items()]
        return add, writer.close
    if name == "wandb":
        import wandb
        name = os.path.basename(out_dir)
        run = wandb.init(project="nanosafe", name=name, dir=out_dir, config=config)
        return lambda step, row: run.log(row, step=step), run.finish
    raise SystemExit(f"error: log_to={name!r}: choose tensorboard or wandb, or leave it empty")
