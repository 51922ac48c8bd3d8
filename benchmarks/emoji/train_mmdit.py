"""Train the demo model's transformer and text encoders: `torchrun --nproc-per-node 2 -m benchmarks.emoji.train_mmdit`.

One process for each core, or on a GPU one alone: `python -m benchmarks.emoji.train_mmdit --device cuda --batch 512`.

Rectified flow (Esser et al. 2024, arXiv 2403.03206): x = (1 - sigma) latent + sigma noise, the target is
noise - latent, sigma is drawn logit-normally. Whole captions and single encoders are dropped at random, so that
guidance and running without T5 work. Needs the autoencoder of `train_vae`.

The learning rate is constant, and falls to nothing in the last minutes of a sitting. `mmdit.pt` is from before the
fall, and the next sitting resumes from it; `mmdit-final.pt` is from after, to be exported. SIGTERM saves and ends.
`--init FOLDER` begins with the weights and tokenizers of an exported demo model.
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.emoji.lean import lean_attention, lean_norms
from benchmarks.emoji.networks import ENCODERS, Trained, begin_with, initialise
from benchmarks.emoji.optimizer import Both
from benchmarks.emoji.pool import Encoder, Pool, provide_tokenizers
from benchmarks.emoji.run_state import Average, Clock, save
from benchmarks.emoji.team import Team

DROP_CAPTION, DROP_T5, DROP_CLIP = 0.1, 0.15, 0.05  # CLIP-L and CLIP-G are dropped each on its own
SIZE = (128, 128)
OTHERS = ((64, 64), (192, 192), (128, 192), (192, 128))  # now and then, so that the model can draw these too
RENEWED = 1 / 8  # new scenes per scene trained on
NOISE_MEAN, NOISE_SPREAD = 0.6, 1.0  # of the logit of sigma
HORIZON = 150  # steps averaged over


class Flow:
    """The loss, computed by a copy of the model in the machine's own number format."""

    def __init__(self, model: Trained, encode: Encoder, latent: dict[str, float]) -> None:
        self.dtype, self.device, self.latent = encode.dtype, encode.device, latent
        self.empty = encode.empty()
        self.model = deepcopy(model).to(self.dtype)
        self.lean = self.device.type == "cpu"
        if self.lean:
            lean_norms(self.model)
            lean_attention(self.model)
        self.pairs = list(zip(self.model.parameters(), model.parameters()))

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights that the optimizer changed."""
        for copy, original in self.pairs:
            copy.copy_(original)

    def loss(self, raw: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Of raw latents `(B, C, h, w)` and their captions."""
        count = len(raw)
        latent = (raw.float() - self.latent["shift"]) * self.latent["scale"]
        drop = torch.rand(count, 1, device=self.device) < DROP_CAPTION
        tokens = {name: torch.where(drop, self.empty[name], ids) for name, ids in tokens.items()}
        chances = {"clip_l": DROP_CLIP, "clip_g": DROP_CLIP, "t5": DROP_T5}
        keep = {name: (torch.rand(count, device=self.device) >= chances[name]).to(self.dtype) for name in ENCODERS}
        noise = torch.randn_like(latent)
        sigma = torch.sigmoid(NOISE_MEAN + NOISE_SPREAD * torch.randn(count, device=self.device))
        x = torch.lerp(latent, noise, sigma[:, None, None, None]).to(self.dtype)
        velocity = self.model(x, sigma, tokens, keep)
        return (velocity.float() - (noise - latent)).square().mean()


def optimizer_of(model: nn.Module) -> Both:
    """Muon for the matrices inside blocks, AdamW for embeddings, norms, modulation and the layers at both ends."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = any(part in name for part in ("joint_blocks.", ".layers.", ".block."))
        muon = inside and p.ndim == 2 and "adaLN" not in name and "relative_attention_bias" not in name
        (matrices if muon else others).append(p)
    return Both(matrices, others, decay=0.01)


class Run:
    """A model in training with all that its checkpoint holds."""

    def __init__(self, args: argparse.Namespace, team: Team) -> None:
        self.args, self.team, self.path = args, team, args.work / "mmdit.pt"
        device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = Trained()
        initialise(self.model)
        if args.init and not self.path.exists():
            begin_with(self.model, args.init)
        self.model.to(device)
        self.optimizer, self.average = optimizer_of(self.model), Average(self.model, HORIZON)
        self.step, self.samples, self.spent, self.latent = 0, 0, 0.0, {}
        if self.path.exists():
            self.load(torch.load(self.path, weights_only=True, map_location=device))
        seed = args.seed + 1_000_003 * (1 + self.step) + 7919 * team.rank
        torch.manual_seed(seed)
        self.encode = Encoder(args.work, device)
        # Every pool grows as it is renewed; the run begins as soon as there is something to learn.
        self.pool = Pool(self.encode, SIZE, min(args.pool, 1536), args.pool, seed)
        few = max(1, args.pool // 200)
        self.others = [Pool(self.encode, size, few, 8 * few, seed + i) for i, size in enumerate(OTHERS, 1)]
        if not self.latent:
            both = team.same(torch.stack([self.pool.latents.float().mean(), self.pool.latents.float().std()]))
            self.latent = {"shift": float(both[0]), "scale": 1.0 / float(both[1])}
        self.flow = Flow(self.model, self.encode, self.latent)

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.values = {name: state["average"][name] for name in self.average.values}
        self.average.steps = self.step = state["step"]
        self.samples, self.spent, self.latent = state["samples"], state["spent"], state["latent"]

    def save(self, path: Path, spent: float) -> None:
        if self.team.rank == 0:
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            counts = {"step": self.step, "samples": self.samples, "spent": self.spent + spent}
            save(path, {**state, "average": self.average.state(), "latent": self.latent, **counts})

    def batch(self) -> tuple[Tensor, dict[str, Tensor]]:
        """As many image tokens in every size."""
        pool = self.pool
        seldom = self.args.seldom
        if self.step % seldom == seldom - 1:
            pool = self.others[self.step // seldom % len(self.others)]
        count = self.args.batch // self.team.size
        fewer = count * SIZE[0] * SIZE[1] // (pool.size[0] * pool.size[1])
        pool.renew(max(1, round(RENEWED * min(count, fewer))))
        return pool.sample(max(1, fewer))

    def update(self, share: float, rate: float) -> tuple[float, float, bool]:
        """One step; what `Team.average` returns."""
        raw, tokens = self.batch()
        loss = self.flow.loss(raw, tokens)
        loss.backward()
        notes = self.team.average(self.flow.model, self.model, share, loss.item())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(rate)
        self.average.update()
        self.flow.refresh()
        self.step, self.samples = self.step + 1, self.samples + len(raw) * self.team.size
        return notes


def train(run: Run, minutes: float, fall: float) -> None:
    """One sitting of so many minutes, in the last `fall` of which the learning rate falls."""
    clock, share, running, falling = Clock(minutes), 0.0, 0.0, False
    constant, saved = 1.0 - fall / minutes, time.monotonic()
    while share < 1.0:
        if share >= constant and not falling:
            run.save(run.path, clock.spent)
            falling = True
        down = min(1.0, (1.0 - share) / (1.0 - constant)) if falling else 1.0
        up = min(1.0, (run.step + 1) / run.args.warmup)
        share, loss, stop = run.update(clock.tick(), run.args.rate * up * max(down, 0.01))
        running = 0.98 * running + 0.02 * loss if running else loss
        if run.team.rank == 0 and run.step % 20 == 0:
            spent = (run.spent + clock.spent) / 60
            print(f"{spent:6.1f} min  step {run.step}  samples {run.samples}  loss {running:.4f}", flush=True)
        if stop or (not falling and time.monotonic() - saved > 300):
            run.save(run.path.with_name("mmdit-final.pt") if falling else run.path, clock.spent)
            saved = time.monotonic()
        if stop:
            return
    run.save(run.path.with_name("mmdit-final.pt"), clock.spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/emoji"), help="folder of checkpoints")
    parser.add_argument("--init", type=Path, default=None, help="folder of an exported demo model to begin with")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--minutes", type=float, default=120, help="training time of this sitting")
    parser.add_argument("--fall", type=float, default=15, help="minutes of it in which the learning rate falls")
    parser.add_argument("--batch", type=int, default=128, help="scenes per step, over all processes")
    parser.add_argument("--seldom", type=int, default=24, help="one step of so many is of another size")
    parser.add_argument("--pool", type=int, default=40_000, help="encoded scenes held by each process")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--warmup", type=int, default=50, help="steps in which the learning rate rises")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    team = Team()
    if team.size > 1:
        torch.set_num_threads(1)
    if team.rank == 0:
        provide_tokenizers(args.work, args.init)
    team.same(torch.zeros(1))  # waits for the tokenizers
    run = Run(args, team)
    if team.rank == 0:
        print(f"latent shift {run.latent['shift']:.4f}, scale {run.latent['scale']:.4f}", flush=True)
    train(run, args.minutes, args.fall)


if __name__ == "__main__":
    main()
