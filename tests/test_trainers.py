"""`gd.interop.as_optimizer` in the trainers of Lightning and of Hugging Face, which `.ci/run` installs.

python -m pytest -m slow tests/test_trainers.py
"""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import gdfunc as gd

from .references import normal

pytestmark = pytest.mark.slow
SAMPLES, BATCH, EPOCHS = 24, 8, 4
STEPS = SAMPLES // BATCH * EPOCHS
TRANSFORM = gd.chain(gd.clip_by_global_norm(0.5), gd.adamw(weight_decay=0.1))


def linearly(optimizer):
    return lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


def run_of_train(loss_fn, model, data):
    """The losses of the same run by `train`, with the lrs of torch's scheduler, and its last parameters."""
    schedule = linearly(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01))
    lrs = []
    for _ in range(STEPS):
        lrs.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    index = gd.epoch_batches(gd.random.key(0), SAMPLES, BATCH, EPOCHS, shuffle=False)
    params = {name: leaf.detach().clone() for name, leaf in model.named_parameters()}
    step = gd.make_step(loss_fn, TRANSFORM)
    final, trajectory = gd.train(step, step.init(params), data, index, lrs, backend="eager")
    return trajectory.loss, final.params


def assert_same_run(losses, model, expected):
    torch.testing.assert_close(torch.stack(losses), expected[0], rtol=1e-12, atol=1e-12)
    params = {name: leaf.detach() for name, leaf in model.named_parameters()}
    torch.testing.assert_close(params, expected[1], rtol=1e-12, atol=1e-12)
    assert losses[-1] < 0.97 * losses[0]


@pytest.fixture
def drawn():
    """Initialised modules draw from torch's generator, and trainers seed all three."""
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


@pytest.fixture
def tokens():
    tokens = gd.random.randint(gd.random.key(0), (SAMPLES, 6), 0, 17)
    return tokens, (tokens.sum(1) % 3)


def tiny(transformers):
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).double()


class Rows(torch.utils.data.Dataset):
    def __init__(self, tokens, labels):
        self.tokens, self.labels = tokens, labels

    def __len__(self):
        return SAMPLES

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


@pytest.mark.filterwarnings("default")
def test_hugging_faces_trainer_gives_the_run_of_train(tmp_path, tokens, drawn):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny(transformers)
    start = copy.deepcopy(model)

    def loss_fn(params, batch):
        words, labels = batch
        inputs = {"input_ids": words, "labels": labels}
        return torch.func.functional_call(start, params, kwargs=inputs).loss

    expected = run_of_train(loss_fn, model, tokens)

    class Watched(transformers.Trainer):
        losses = ()

        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            self.losses = [*self.losses, loss.detach()]
            return loss

    def trainer_of(model):
        optimizer = gd.interop.as_optimizer(TRANSFORM, model.named_parameters(), 0.01)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            max_grad_norm=0.0,
            logging_strategy="no",
            save_strategy="steps",
            save_steps=STEPS // 2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        schedule = linearly(optimizer)
        return Watched(model, arguments, train_dataset=Rows(*tokens), optimizers=(optimizer, schedule))

    trainer = trainer_of(model)
    trainer.train()
    assert_same_run(trainer.losses, model, expected)
    # A run that was stopped half-way reads the optimizer's file, and goes on.
    resumed = trainer_of(copy.deepcopy(start))
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert len(resumed.losses) == STEPS // 2
    assert_same_run([*trainer.losses[: STEPS // 2], *resumed.losses], resumed.model, expected)


@pytest.mark.filterwarnings("default")
def test_lightnings_trainer_gives_the_run_of_train(tmp_path, drawn):
    lightning = pytest.importorskip("lightning.pytorch")
    x = normal(0, SAMPLES, 4)
    data = x, torch.tanh(x @ normal(1, 4, 1))
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    start = copy.deepcopy(net)

    def loss_fn(params, batch):
        return gd.losses.mse(torch.func.functional_call(start, params, batch[0]), batch[1])

    expected = run_of_train(loss_fn, net, data)

    class Module(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net, self.losses = net, []

        def training_step(self, batch, number):
            loss = nn.functional.mse_loss(self.net(batch[0]), batch[1])
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            optimizer = gd.interop.as_optimizer(TRANSFORM, self.net.named_parameters(), 0.01)
            return [optimizer], [{"scheduler": linearly(optimizer), "interval": "step"}]

    def trainer_of(epochs):
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    def batches():
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), BATCH)

    module = Module(net)
    trainer_of(EPOCHS).fit(module, batches())
    assert_same_run(module.losses, net, expected)
    # A checkpoint of Lightning's holds the optimizer, and another process goes on from it.
    half, rest = Module(copy.deepcopy(start)), Module(copy.deepcopy(start))
    trainer = trainer_of(EPOCHS // 2)
    trainer.fit(half, batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(EPOCHS).fit(rest, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert_same_run([*half.losses, *rest.losses], rest.net, expected)
