"""Settings of training: a stage, its engine, distillation, and what is asked of the cluster."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from f2llm_ray.base.section import Batches, Content, Effect, Neutral, Output, Section
from f2llm_ray.data.schema import TASKS, Task, TextPrompts
from f2llm_ray.model.settings import Prompts


class EngineSettings(Section):
    """The DeepSpeed engine and the shape of the work on each worker."""

    zero_stage: Neutral[Literal[0, 1, 2, 3]] = 2
    """What DeepSpeed ZeRO splits over the workers: nothing, optimizer state (1), gradients (2), weights (3)."""
    precision: Output[Literal["fp32", "bf16"]] = "bf16"
    """Numbers that the model computes in; bf16 needs GPUs."""
    offload: Neutral[bool] = False
    """Optimizer state in host memory."""
    tokens_per_pass: Neutral[int] = Field(default=16_384, ge=64)
    """Token budget of one forward pass of the encoder; a micro-batch is cut into passes of similar lengths."""
    tokens_per_chunk: Neutral[int | None] = Field(default=None, ge=64)
    """GradCache: the activations of at most this many tokens are held at a time, at the cost of a second forward
    pass; unset holds those of the whole batch."""
    gradient_checkpointing: Neutral[bool] = False
    """Activations inside each layer are computed again in the backward pass and not kept, which saves memory."""
    compile: Neutral[bool] = False
    """torch.compile of each of the backbone's layers, for any number and length of texts."""
    loader_prefetch: Neutral[int] = Field(default=4, ge=1)
    """Micro-batches that Ray Data keeps ready ahead of the step."""


class Merge(Section):
    """Merging the weights of the last checkpoints of a stage into one more model, `<stage>-merged`."""

    last: Output[int] = Field(default=3, ge=2)
    """How many: the stage's model at its last step, and the checkpoints before it."""
    method: Output[Literal["average", "slerp"]] = "average"
    """The mean of the weights, or the middle of the arc between two."""

    @model_validator(mode="after")
    def _arc(self) -> Merge:
        if self.method == "slerp" and self.last != 2:
            raise ValueError(f"slerp is between 2 models; last is {self.last}")
        return self


class Elastic(Section):
    """Training a model so that its first layers alone are models too: matryoshka learning in depth.

    2D matryoshka (Li et al. 2024, arXiv 2402.14776) and ML-Embed, the sister paper of F2LLM-v2; docs/training.md.
    """

    layers: Output[tuple[Annotated[int, Field(ge=1)], ...]]
    """Numbers of layers after which it may be cut, below all that it has: [7, 14] of 28. The loss is the mean over
    them and the whole model."""

    @model_validator(mode="after")
    def _rise(self) -> Elastic:
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers: found {list(self.layers)}, expected different numbers that rise")
        return self


ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""What `lora.targets` says for all linear weights of the layers."""


class Lora(Section):
    """LoRA (Hu et al. 2021, arXiv 2106.09685): matrices beside the linear weights are trained in their place.

    The model that the stage writes has what they change added to its weights, and is one like any other;
    docs/training.md.
    """

    rank: Output[int] = Field(default=16, ge=1)
    """Rank of the change of each weight: the inner size of its two matrices."""
    alpha: Output[float | None] = Field(default=None, gt=0)
    """The change is multiplied by alpha / rank; unset is twice the rank, so by 2."""
    targets: Output[Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)]] = ALL_LINEAR
    """Which weights: all linear ones of the layers; or a list of what their modules' names end in, such as
    [q_proj, v_proj]."""

    @property
    def scaled_by(self) -> float:
        """Alpha in force."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.scaled_by / self.rank


LENGTHS = ("epochs", "max_steps", "max_minutes")
"""The keys of a stage that say how long it is."""


class TrainStage(Section):
    """One contrastive stage. The defaults are those of the paper's public code."""

    kind: Neutral[Literal["train", "distill"]] = "train"
    model: Neutral[str | None] = None
    """The model that it goes on from; the one before it when unset."""
    tasks: Batches[tuple[Task, ...]] = TASKS
    """Tasks whose sources are used."""
    sources: Batches[tuple[str, ...] | None] = None
    """Names of the sources that are used; all with a fitting task when unset."""
    instructions: Batches[bool] = True
    """Put each source's instruction before its queries."""
    epochs: Batches[int] = Field(default=1, ge=1)
    """Passes over the rows of the stage."""
    max_steps: Batches[int | None] = Field(default=None, ge=1)
    """Optimizer steps of the stage, in place of `epochs`: rows come again as often as that takes, and the schedule
    is stretched over these steps."""
    max_minutes: Neutral[float | None] = Field(default=None, gt=0)
    """Minutes that the stage's steps and validations take, in place of `epochs` and `max_steps`. Some steps are
    timed before, on the same machines; that fixes the number of steps, and with it the schedule. The number stands
    in the manifest, and a run that goes on keeps it. Two runs may come to different numbers, and so to different
    models; the same number as `max_steps` makes the same model. Starting up, timing, mining, a cached teacher's
    vectors and writing the model come on top."""
    global_batch: Batches[int] = Field(default=512, ge=2)
    """Rows whose passages are each other's negatives, over all workers."""
    accumulate: Batches[int] = Field(default=1, ge=1)
    """Global batches per optimizer step. Each keeps its own in-batch negatives, and the step's gradient is their
    mean; `engine.tokens_per_chunk` (GradCache) instead makes one global batch of any size fit into memory."""
    language_temperature: Batches[float] = Field(default=1.0, ge=1)
    """Evens out the languages of a source: one of n rows is drawn in proportion to n^(1/temperature)."""
    length_window: Batches[int] = Field(default=1, ge=1)
    """Global batches whose rows are sorted by length before they are cut, so that a batch has similar lengths; 1
    leaves lengths mixed."""
    negatives: Batches[dict[Task, int]] = {"retrieval": 7, "clustering": 9, "classification": 1}
    """Hard negatives drawn per row and epoch."""
    temperature: Output[float] = Field(default=0.05, gt=0)
    """What cosines are divided by in the contrastive terms: the smaller, the more the nearest negatives count."""
    temperatures: Output[dict[Task, float]] = {}
    """Another temperature for some tasks."""
    hard_negative_weight: Output[float] = Field(default=1.0, ge=0)
    """Weight of the contrastive term of a row's own negatives."""
    in_batch_weight: Output[float] = Field(default=1.0, ge=0)
    """Weight of the contrastive term of the other rows' passages, for retrieval."""
    passage_to_query_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the in-batch term taken the other way: a row's passage against the queries of all rows (CLIP)."""
    same_side_negatives: Output[bool] = False
    """In-batch negatives of a query are the other queries too, and those of a passage the other passages (GTE)."""
    hardness: Output[float] = Field(default=0.0, ge=0)
    """A negative of cosine s counts exp(hardness * s) times in the contrastive terms (EmbeddingGemma: 5)."""
    spread_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the mean squared cosine between different queries, plus that between different passages, which
    spreads vectors out (Zhang et al. 2017, arXiv 1708.06320; EmbeddingGemma)."""
    score_margin_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the MSE between the margins of the scores that rows bring and the model's (margin-MSE, Hofstätter
    et al. 2020, arXiv 2010.02666). The model's score is the cosine over the temperature."""
    score_kl_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the KL divergence between the softmax of these scores and of the model's, over the passage and the
    negatives of a row."""
    score_scale: Output[float] = Field(default=1.0, gt=0)
    """What scores are multiplied by: 1 for logits, such as a cross-encoder's; 20 for cosines, at a temperature of
    0.05."""
    absolute_margin: Output[float | None] = None
    """Negatives whose cosine is above the passage's minus this are taken for false ones and left out; -0.1 leaves
    out what is better than the passage by 0.1 (Qwen3-Embedding). Unset in the paper."""
    relative_margin: Output[float | None] = Field(default=None, ge=0, le=1)
    """The same with this share of the passage's cosine, as in mining: 0.05 leaves out what is above 95 % of it."""
    matryoshka_min_dim: Output[int] = Field(default=8, ge=1)
    """Smallest matryoshka dim; the dims are its doublings below the hidden size, and the hidden size."""
    elastic: Elastic | None = None
    """Trains the model's first layers to be models of their own; only the whole one when unset."""
    gather_gradient: Output[bool] = True
    """Gradient to other ranks' passages in the in-batch term; the paper's code has none."""
    lr: Output[float] = Field(default=8e-6, gt=0)
    """Largest learning rate of AdamW: that after `warmup_steps`."""
    min_lr: Output[float] = Field(default=1e-7, ge=0)
    """The learning rate of the last step; it falls to it along a cosine."""
    warmup_steps: Output[int] = Field(default=500, ge=0)
    """First steps, in which the learning rate rises in a line."""
    weight_decay: Output[float] = Field(default=0.01, ge=0)
    """AdamW's decay of weights."""
    betas: Output[tuple[float, float]] = (0.9, 0.98)
    """AdamW's shares of the past in its means of the gradient and of its square."""
    clip: Output[float] = Field(default=1.0, gt=0)
    """Largest global gradient norm."""
    freeze_embeddings: Output[bool] = False
    """Leave the input embeddings as they are. In a small multilingual model they are most of the parameters, and
    the optimizer's step over them most of the time of a step on CPU."""
    lora: Lora | None = None
    """Trains small matrices beside the linear weights, in place of all weights; all when unset."""
    checkpoint_every: Annotated[int, Effect(output=True, only_with="keep_best")] = Field(default=500, ge=1)
    """Optimizer steps between checkpoints."""
    validation_rows: Annotated[int, Effect(output=True, only_with="keep_best")] = Field(default=4096, ge=1)
    """Held-out rows, rounded up to whole batches, that loss and score are taken on at each checkpoint, at most."""
    keep_checkpoints: Neutral[int] = Field(default=2, ge=1)
    """The last ones are kept; with `keep_best` the best ones, and the last."""
    keep_best: Output[bool] = False
    """Export the best checkpoint instead of the last step (paper: the last)."""
    best_by: Annotated[Literal["loss", "score"], Effect(output=True, only_with="keep_best")] = "loss"
    """What `keep_best` goes by: the lowest validation loss, or the highest nDCG@10 on held-out retrieval rows."""
    merge: Neutral[Merge | None] = None
    """What comes after goes on from the merged model, where it does not name another; both are evaluated."""
    engine: EngineSettings = EngineSettings()

    @property
    def exits(self) -> tuple[int, ...]:
        """Numbers of layers, beside all, after which the model is trained to be cut."""
        return () if self.elastic is None else self.elastic.layers

    @model_validator(mode="after")
    def _fits_together(self) -> TrainStage:
        other = "max_steps" if self.max_steps is not None else "epochs"
        if self.max_minutes is not None and (self.max_steps is not None or "epochs" in self.model_fields_set):
            raise ValueError(f"max_minutes: says how long the stage is, and so does {other}; leave one out")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not exceed lr ({self.lr})")
        if self.lora is not None and self.engine.compile:
            raise ValueError("lora: was not tried with engine.compile; leave one out")
        if self.merge is not None and self.keep_best:
            raise ValueError("merge: takes the last checkpoints, and keep_best keeps others; use one of them")
        if self.merge is not None and self.keep_checkpoints < self.merge.last - 1:
            raise ValueError(
                f"merge.last: {self.merge.last} with the model itself need keep_checkpoints "
                f"{self.merge.last - 1} or more; it is {self.keep_checkpoints}"
            )
        return self


def is_endpoint(teacher: str) -> bool:
    """Whether a model is given as URL#NAME."""
    return teacher.startswith(("http://", "https://"))


class Distill(TrainStage):
    """Training of a model towards a teacher, beside the contrastive loss; docs/distillation.md."""

    kind: Neutral[Literal["distill"]] = "distill"
    teacher: Content[str]
    """The model that teaches: one of the run's; the path of a model folder, of any run or of sentence-transformers
    and of any width; URL#NAME of an OpenAI-compatible endpoint, with the key in OPENAI_API_KEY; or Parquet files
    with the columns text and vector, for every text of the stage."""
    teacher_prompts: Prompts = Prompts()
    """What the teacher's texts start with; what its folder says where unset."""
    teacher_vectors: Output[Literal["cached", "online"]] = "cached"
    """Encode each distinct text of the stage's batches once, before it; or in every batch beside the student."""
    mse_weight: Output[float] = Field(default=1.0, ge=0)
    """Weight of the MSE between un-normalised vectors and the teacher's first dims (paper: 1)."""
    cosine_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of one minus the cosine of the two (Jasper and Stella, arXiv 2412.19048)."""
    similarity_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the KL divergence between the teacher's and the student's softmax over the cosines of a query with
    the passages of all ranks."""
    similarity_temperature: Output[float] = Field(default=0.05, gt=0)
    """What these cosines are divided by."""
    margin_weight: Output[float] = Field(default=0.0, ge=0)
    """Weight of the MSE between the two's margins: the cosine of a query and its passage minus that with each of
    its hard negatives (Hofstätter et al. 2020, arXiv 2010.02666)."""
    projection: Output[bool] = False
    """MSE and cosine compare the teacher's whole vectors with a linear map of the student's, which is trained with
    it and left out of the exported model. Always so where the student has more dims than the teacher."""
    space: Output[Literal["own", "teacher"]] = "own"
    """Where the student's vectors end: in a space of its own; or in the teacher's, by a linear map after pooling
    that is part of the exported model (a Dense module of sentence-transformers). Its vectors then have the
    teacher's dims, and its queries may search an index of the teacher's passages (LEAF, arXiv 2509.12539)."""

    @property
    def uses_teacher(self) -> bool:
        """Whether any term needs the teacher's vectors."""
        return self.mse_weight + self.cosine_weight + self.similarity_weight + self.margin_weight > 0

    @property
    def teaches_by_model(self) -> bool:
        """Whether the teacher is a model, of the run or in a folder, and no endpoint or table."""
        return not is_endpoint(self.teacher) and not self.teacher.endswith(".parquet")

    def taught_prompts(self, own: TextPrompts) -> TextPrompts:
        """What the teacher's texts start with, given what it says itself."""
        query, document = self.teacher_prompts.query, self.teacher_prompts.document
        return TextPrompts(own.query if query is None else query, own.document if document is None else document)

    @property
    def matches_vectors(self) -> bool:
        """Whether a term compares single vectors, and not only similarities."""
        return self.mse_weight + self.cosine_weight > 0

    @property
    def teacher_is_cut(self) -> bool:
        """Whether the student learns from as many of the teacher's first dims as it has, and not from all."""
        compares = self.similarity_weight + self.margin_weight > 0
        return self.matches_vectors and not self.projection and not compares and not self.joins_teacher

    @property
    def joins_teacher(self) -> bool:
        """Whether the student's vectors end in the teacher's space."""
        return self.space == "teacher"

    @model_validator(mode="after")
    def _projects_something(self) -> Distill:
        if "#" not in self.teacher and is_endpoint(self.teacher):
            raise ValueError(f"teacher: found {self.teacher}, expected URL#NAME, such as http://host/v1#model")
        if self.teacher_vectors == "online" and not self.teaches_by_model:
            raise ValueError("teacher_vectors: online needs a model folder as teacher; use cached")
        if self.projection and not self.matches_vectors:
            raise ValueError("projection: nothing is projected where mse_weight and cosine_weight are 0")
        if self.joins_teacher and not self.matches_vectors:
            raise ValueError("space: teacher needs mse_weight or cosine_weight above 0, which bring vectors there")
        if self.joins_teacher and self.projection:
            raise ValueError("projection: space teacher has its own map, which the model keeps; leave one out")
        return self


class Mlflow(Section):
    """An MLflow experiment; user, password and token are read from MLflow's environment variables."""

    uri: Neutral[str | None] = None
    """Tracking server or store; unset takes MLFLOW_TRACKING_URI."""
    experiment: Neutral[str | None] = None
    """Its name; unset takes the recipe's."""

    @model_validator(mode="after")
    def _no_secret(self) -> Mlflow:
        if self.uri is not None and "@" in self.uri.split("://")[-1].split("/")[0]:
            raise ValueError(
                "uri: names a user; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class Wandb(Section):
    """A Weights & Biases project; the key is read from WANDB_API_KEY."""

    project: Neutral[str]
    """Name of the project."""
    entity: Neutral[str | None] = None
    """The user or team that it belongs to; your default one when unset."""
    offline: Neutral[bool] = False
    """Write into the stage's folder, for `wandb sync` later."""


class Tracking(Section):
    """Where training is shown beside Ray's dashboard; changing it runs no stage again."""

    tensorboard: Neutral[bool] = True
    """Event files in each stage's folder, where that is a local one."""
    mlflow: Mlflow | None = None
    wandb: Wandb | None = None
