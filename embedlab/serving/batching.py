"""Requests that come at the same time share one forward pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from embedlab._types import Vectors
from embedlab.serving.gate import busy

Image = np.ndarray[Any, Any]


class Batcher:
    """Collects images for a moment and embeds them together, in a thread of its own.

    Args:
        embed: Images (B, C, H, W) of one shape to vectors (B, D).
        largest: Images per call.
        seconds: How long the first image of a batch waits for others.
    """

    def __init__(self, embed: Callable[[Image], Vectors], *, largest: int = 32, seconds: float = 0.003) -> None:
        self._embed = embed
        self._largest = largest
        self._seconds = seconds
        self._queue: asyncio.Queue[tuple[Image, asyncio.Future[Vectors]]] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedlab-model")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def stop(self) -> None:
        """Refuse whoever still waits."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        while not self._queue.empty():
            _refuse(self._queue.get_nowait()[1])
        await asyncio.to_thread(self._thread.shutdown)

    async def vector(self, image: Image) -> Vectors:
        """The embedding (1, D) of one image (C, H, W)."""
        result: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((image, result))
        return await result

    async def _work(self) -> None:
        while True:
            batch = [await self._queue.get()]
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        while len(batch) < self._largest:
                            batch.append(await self._queue.get())
                shapes: dict[Any, list[tuple[Image, asyncio.Future[Vectors]]]] = {}
                for entry in batch:  # of one shape, unless the embedder takes images of any size
                    shapes.setdefault((entry[0].shape, entry[0].dtype), []).append(entry)
                for entries in shapes.values():
                    await self._answer(entries)
            finally:
                for _, result in batch:
                    _refuse(result)

    async def _answer(self, entries: list[tuple[Image, asyncio.Future[Vectors]]]) -> None:
        try:
            images = np.stack([image for image, _ in entries])
            vectors = await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, images)
            for row, (_, result) in enumerate(entries):
                if not result.done():  # else the client has gone
                    result.set_result(vectors[row : row + 1])
        except Exception as error:
            for _, result in entries:
                if not result.done():
                    result.set_exception(error)


def _refuse(result: asyncio.Future[Vectors]) -> None:
    if not result.done():
        result.set_exception(busy("The server is stopping"))
