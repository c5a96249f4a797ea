"""Settings of the trainer, each with its sentence. Importable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from bridge.backend import BackendSpec
from bridge.config import ConfigError

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Correlation = Annotated[float, Meta(ge=0, lt=1)]

ATTEMPTS_PER_DEMO = 5
"""Seeds that the scripted expert may try for each demonstration that is wanted."""


class DemosConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Scripted demonstrations."""

    per_task: Count = 10
    """Successful demonstrations collected for each task."""
    first_seed: int = 0
    """Seeds are taken from here upwards, at most five for each demonstration that is wanted: one that fails is not kept
    and its seed is passed over."""
    workers: Count | None = None
    """Processes that each drive one backend. None: one for each core, as far as there is work for them, but one for a
    backend whose time passes by itself (a robot). The demonstrations are the same for any number."""

    @property
    def seeds(self) -> range:
        """All that may be tried for a task."""
        return range(self.first_seed, self.first_seed + ATTEMPTS_PER_DEMO * self.per_task)


class VLAConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The small reference VLA: camera images, proprioception and instruction tokens -> Gaussian chunk."""

    horizon_steps: Count = 8
    """h: actions in a chunk."""
    channels: tuple[Count, ...] = (48, 96, 128)
    """Channels of the convolutions of the image encoder; the first reduces the image by 4, each other one by 2."""
    width: Count = 384
    """Width of the fusion MLP."""
    text_width: Count = 64
    """Width of the token embeddings and of the instruction vector."""
    max_tokens: Count = 32
    """Instruction tokens; longer instructions are refused, not cut."""
    vocabulary: Count = 512
    """Size of the byte-level BPE vocabulary built from the deployment's instructions."""
    sigma: Positive = 0.2
    """Initial standard deviation of each action, in units of half its range."""
    noise_correlation: Correlation = 0.0
    """rho of the exploration noise along a chunk, an AR(1) process; 0 is white noise."""
    prefix_steps: Annotated[int, Meta(ge=0)] = 0
    """Committed actions that the policy can be told at the head of its chunk, for robots that ask for the next chunk
    while one plays; it learns to plan on from any number up to this. 0: it is told none."""

    def __post_init__(self) -> None:
        if self.prefix_steps >= self.horizon_steps:
            raise ValueError(f"prefix_steps {self.prefix_steps} must be below horizon_steps {self.horizon_steps}")


class SFTConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Supervised fine-tuning on demonstrations (AdamW, cosine schedule, random-shift augmentation)."""

    steps: Count = 2500
    """Gradient steps."""
    batch: Count = 128
    """Samples in a gradient step."""
    lr: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-4
    """AdamW's decay of matrices."""
    shift_px: Annotated[int, Meta(ge=0)] = 3
    """Largest random shift of the images, in pixels of the policy's image."""
    word_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    """Share of an instruction's tokens that are left out at random when it is cloned, here and in deployment."""
    auxiliary: Annotated[float, Meta(ge=0)] = 0.0
    """Weight of predicting the simulator's privileged state from the policy's features, for pretraining only: the head
    that does it is not exported. 0: none."""


class PPOConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Action-chunked PPO."""

    gamma: Fraction = 0.99
    """Discount of one environment step."""
    lam: Fraction = 0.95
    """lambda of GAE, over decisions."""
    clip: Positive = 0.2
    """Clipping range of the ratio of the executed slice."""
    target_kl: Positive = 0.05
    """KL that an update should have, in nats a decision, as its last pass over the batch goes: the learning rate
    follows it, and an update that is at twice this ends."""
    lr: Positive = 5e-5
    """Learning rate of the actor at first; it stays between a tenth of this and ten times this."""
    epochs: Count = 5
    """Passes over the batch."""
    minibatch: Count = 500
    """Decisions in a gradient step."""
    max_grad_norm: Positive = 1.0
    """Gradients longer than this are scaled down."""
    reward: Literal["sparse", "backend"] = "sparse"
    """What is rewarded: `sparse`, the success alone; `backend`, an ablation, the backend's own reward instead."""
    success_reward: float = 1.0
    """Reward of the step that succeeds, where the reward is sparse."""
    reward_scale: Positive = 1.0
    """The backend's own reward is multiplied by this, where it is used."""
    step_cost: Annotated[float, Meta(ge=0)] = 0.005
    """Price of every step: it makes a shorter success worth more. A failure that ends the episode costs as much as
    going on for ever, `step_cost` / (1 - `gamma`). A backend's reward that is above it would pay for putting success
    off, since an episode ends there."""
    sigma: Positive | None = None
    """Standard deviation that training starts with, in units of half the action's range; null: that of the bundle."""
    noise_correlation: Correlation | None = None
    """rho of the exploration noise along a chunk that training starts with; null: that of the bundle."""
    learn_sigma: bool = False
    """Whether PPO may change the standard deviation, which depends on neither task nor state."""
    critic_lr: Positive = 1e-3
    """Learning rate of the value network."""
    critic_warmup_iterations: Annotated[int, Meta(ge=0)] = 2
    """First iterations in which only the value network learns."""
    critic_warmup_epochs: Count = 40
    """Passes of the value network over the batch in those iterations."""
    critic_epochs: Count = 10
    """Passes of the value network over the batch in every later iteration."""

    def __post_init__(self) -> None:
        if self.gamma == 1.0 and self.reward == "sparse":
            raise ValueError("gamma must be below 1 where the reward is sparse: a failure would cost infinitely much")


class BufferConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The demonstration buffer."""

    per_task: Count = 100
    """Episodes kept for each task."""
    admit: bool = True
    """Whether own successes are taken in; if not, the demonstrations are all there is to clone."""
    quantile: Fraction = 0.5
    """A success is admitted when it is at most as long as this quantile of the task's recent successes."""
    window: Count = 50
    """Recent successes of a task over which the quantile runs."""


class WeightConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The weight w(t) between PPO and self behaviour cloning: total = w L_ppo + (1 - w) c L_sbc."""

    cloning_scale: Annotated[float, Meta(ge=0)] = 0.06
    """c: scale of the cloning loss, a negative log-prob per action. 0: PPO alone, with w = 1 after the warm-up."""
    anchor: Literal["buffer", "sft"] = "buffer"
    """What holds the policy: `buffer`, cloning the demonstration buffer; `sft`, the KL to the policy that the run
    started from in place of the cloning loss."""
    ramp_iterations: Positive = 4.0
    """w rises as tanh(iterations after the critic's warm-up / this)."""
    w_max: Fraction = 0.9
    """Largest w; 0 leaves the cloning loss alone."""
    fixed: Fraction | None = None
    """A constant w after the critic's warm-up in place of the adaptive one."""


class StopConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """When training ends by itself; the first limit that is reached counts. None at all: it goes on until stopped."""

    minutes: Positive | None = None
    """Wall-clock minutes of training, pauses between a stop and a resume not counted."""
    env_steps: Count | None = None
    """Environment steps learned from."""
    iterations: Count | None = None
    """Trainer iterations."""


class EvaluateConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Evaluation: mean action, goals from seeds that training never sees, the episode ends at success."""

    episodes_per_task: Count = 50
    """Episodes of each task."""
    first_seed: int = 2_000_000
    """Seeds of the goals, taken from here upwards; those from 1,000,000 are left for choosing settings."""


class TrainerConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """The trainer's settings."""

    tasks: tuple[str, ...] = ()
    """Tasks to train on; empty: all tasks of the backend."""
    post_train: tuple[str, ...] = ()
    """Those of the tasks that are improved in deployment: no episodes of the others are collected, but they are cloned
    from their demonstrations, so that they are not forgotten. Empty: all."""
    start: str | None = None
    """Bundle that supervised fine-tuning starts from: a shipped one by name, or a path; none: a fresh network."""
    policy: str | None = None
    """The first version of the run: a bundle to go on from, as it is, instead of supervised fine-tuning; a shipped one
    by name, or a path. Demonstrations are collected all the same where there is a scripted expert, for the buffer."""
    train_first_seed: int = 10_000
    """Seeds of training episodes are drawn from here upwards ..."""
    train_seeds: Count = 900_000
    """... this many of them, so that they never meet those of the evaluation."""
    threads: Count = 1
    """Threads of torch. More than one pays only where no other process wants the cores: two that have to wait for each
    other were measured at a tenth of the speed of one."""
    episodes_per_iteration: Count = 20
    """Episodes in one PPO batch, for each task on average; which tasks get more is `runtime.balance`."""
    max_staleness_versions: Annotated[int, Meta(ge=0)] = 2
    """Decisions of versions older than this many before the newest are left out of PPO and counted."""
    tensorboard: bool = False
    """Curves for TensorBoard in `runs/NAME/trainer/tensorboard`; needs the extra `metrics`."""
    demos: DemosConfig = DemosConfig()
    vla: VLAConfig = VLAConfig()
    sft: SFTConfig = SFTConfig()
    ppo: PPOConfig = PPOConfig()
    buffer: BufferConfig = BufferConfig()
    weight: WeightConfig = WeightConfig()
    stop: StopConfig = StopConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        evaluated = range(self.evaluate.first_seed, self.evaluate.first_seed + self.evaluate.episodes_per_task)
        for name, used in (
            ("train_first_seed, train_seeds", range(self.train_first_seed, self.train_first_seed + self.train_seeds)),
            ("demos", self.demos.seeds),
        ):
            if used.start < evaluated.stop and evaluated.start < used.stop:
                raise ValueError(
                    f"evaluate: goals from seeds {evaluated.start} to {evaluated.stop - 1} are trained on ({name}: "
                    f"seeds {used.start} to {used.stop - 1}); give another evaluate.first_seed"
                )

    def trained(self, spec: BackendSpec) -> tuple[str, ...]:
        """Tasks of the backend that the policy is for."""
        return self.tasks or tuple(spec.instructions)

    def post_trained(self, spec: BackendSpec) -> tuple[str, ...]:
        """Tasks that are improved in deployment. Raises `ConfigError` for one that the policy is not for."""
        tasks = self.trained(spec)
        for task in self.post_train:
            if task not in tasks:
                raise ConfigError(f"$.trainer.post_train: {task!r} is not among the tasks ({', '.join(tasks)})")
        return self.post_train or tasks
