"""The steps that are compared, one per peer: same rows, one thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from benchmarks.train.setup import Place
from f2llm_ray.engine.attention import use_varlen
from f2llm_ray.engine.encode import encode
from f2llm_ray.model.checkpoint import load_backbone, matryoshka_dims
from f2llm_ray.model.families import Pooling, without_dropout
from f2llm_ray.train.deepspeed import start_engine
from f2llm_ray.train.loader import TrainBatch
from f2llm_ray.train.losses import TextPlaces, contrastive
from f2llm_ray.train.settings import TrainStage

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[TrainBatch], None]


def loss_of(v_nd: torch.Tensor, batch: TrainBatch, stage: TrainStage) -> torch.Tensor:
    """The paper's objective on the vectors of a batch."""
    arrays = (batch.query, batch.passage, batch.negative, batch.passage_id, batch.query_id)
    places = TextPlaces(*(torch.from_numpy(array.copy()) for array in arrays))
    return contrastive(v_nd, places, stage, "retrieval")[0]


class Encoder(torch.nn.Module):
    """The encoder as the engine sees it."""

    def __init__(self, backbone: Any, pooling: Pooling, tokens_per_pass: int) -> None:
        super().__init__()
        self.backbone, self.pooling, self.tokens_per_pass = backbone, pooling, tokens_per_pass

    def forward(self, tokens: list[np.ndarray]) -> torch.Tensor:
        """The vectors of the texts."""
        return encode(self.backbone, tokens, pooling=self.pooling, tokens_per_pass=self.tokens_per_pass)


def our_step(place: Place) -> Step:
    """Our engine's step."""
    stage = place.stage
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place.root}/group-{os.getpid()}", rank=0, world_size=1
    )
    encoder = Encoder(load_backbone(place.model), place.pooling, stage.engine.tokens_per_pass)
    engine = start_engine(encoder, stage, 1)
    engine.train()

    def step(batch: TrainBatch) -> None:
        engine.backward(loss_of(engine(batch.tokens).float(), batch, stage))
        engine.step()

    return step


def bare_step(place: Place) -> Step:
    """Forward and backward of the encoder alone."""
    stage = place.stage
    backbone = load_backbone(place.model).train()
    use_varlen(backbone)

    def step(batch: TrainBatch) -> None:
        backbone.zero_grad()
        loss_of(
            encode(backbone, batch.tokens, pooling=place.pooling, tokens_per_pass=stage.engine.tokens_per_pass),
            batch,
            stage,
        ).backward()

    return step


def official_step(place: Place) -> Step:
    """One padded forward pass of all texts, without gradient to gathered passages."""
    stage = place.stage.model_copy(update={"gather_gradient": False})
    backbone = load_backbone(place.model).train()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=stage.lr, betas=stage.betas)

    def step(batch: TrainBatch) -> None:
        lengths = torch.tensor([len(text) for text in batch.tokens])
        ids = torch.zeros(len(lengths), int(lengths.max()), dtype=torch.long)
        for row, text in zip(ids, batch.tokens, strict=True):
            row[: len(text)] = torch.from_numpy(text.astype(np.int64))
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        vectors = hidden[torch.arange(len(lengths)), lengths - 1]
        optimizer.zero_grad()
        loss_of(vectors, batch, stage).backward()
        torch.nn.utils.clip_grad_norm_(backbone.parameters(), stage.clip)
        optimizer.step()

    return step


class Peer:
    """sentence-transformers' trainer on the same rows."""

    def __init__(self, place: Place) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

        self.model = SentenceTransformer(str(place.model), device="cpu")
        ranking = MultipleNegativesRankingLoss(self.model, scale=1 / place.stage.temperature)
        hidden = self.model.get_sentence_embedding_dimension()
        dims = matryoshka_dims(int(hidden or 0), place.stage.matryoshka_min_dim)
        self.loss = ranking if len(dims) == 1 else MatryoshkaLoss(self.model, ranking, [*reversed(dims)])
        self.place = place
        without_dropout(self.model[0].auto_model)  # as ours is

    def first_loss(self, batch: TrainBatch) -> float:
        """The loss of a batch before any step."""
        rows = list(self._rows(batch))
        features = [self.model.tokenize([row[column] for row in rows]) for column in rows[0]]
        self.model.train()
        return float(self.loss(features, torch.zeros(len(rows))).detach())

    def seconds(self, batches: list[TrainBatch]) -> float:
        """Seconds that training on these batches takes, from its begin to its end."""
        from datasets import Dataset
        from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
        from transformers import TrainerCallback

        now = CLOCKS[self.place.clock]

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                self.started = now()

            def on_train_end(self, *_: Any, **__: Any) -> None:
                self.seconds = now() - self.started

        clock = Clock()
        arguments = SentenceTransformerTrainingArguments(
            output_dir=str(self.place.root / "trainer"),
            per_device_train_batch_size=self.place.stage.global_batch,
            num_train_epochs=1,
            learning_rate=self.place.stage.lr,
            max_grad_norm=self.place.stage.clip,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        rows = Dataset.from_list([row for batch in batches for row in self._rows(batch)])
        trainer = SentenceTransformerTrainer(self.model, arguments, rows, loss=self.loss, callbacks=[clock])
        trainer.train()
        return clock.seconds

    def _rows(self, batch: TrainBatch) -> Iterator[dict[str, str]]:
        texts = [self.place.text_of[text.tobytes()] for text in batch.tokens]
        for query, passage, negatives in zip(batch.query, batch.passage, batch.negative, strict=True):
            columns = {f"negative_{number}": texts[place] for number, place in enumerate(negatives)}
            yield {"query": texts[query], "passage": texts[passage], **columns}
