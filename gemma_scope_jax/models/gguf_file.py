"""GGUF files of llama.cpp: a header of fields, checked against the size of the file, and tensors."""

import functools
import sys

import gguf
import numpy as np

from gemma_scope_jax.runtime import files
from gemma_scope_jax.runtime.errors import WeightsError
from gemma_scope_jax.runtime.printing import quoted

_MAX_READS = 2**22  # Values read from a GGUF file's header; Gemma 3's vocabulary takes a million.


class _Reader(gguf.GGUFReader):
    """The reader of gguf, which here checks lengths in the header against the size of the file."""

    _reads = 0

    def _get(
        self, offset: int, dtype: np.typing.DTypeLike, count: int = 1, override_order: str | None = None
    ) -> np.ndarray:
        # After the end, reads would return empty arrays, as many as the header claims.
        self._reads += 1
        if int(offset) + int(count) * np.dtype(dtype).itemsize > self.data.size or self._reads > _MAX_READS:
            raise WeightsError("its header claims more data than the file has")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(
        self, orig_offs: int, raw_type: int
    ) -> tuple[int, list[np.ndarray], list[int], list[gguf.GGUFValueType]]:
        # The vocabulary is three arrays of 262k items, which gguf reads with several calls for each item.
        if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I" or sys.byteorder != "little":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        start = offset = orig_offs + 12
        types = [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType(int(kind[0]))]
        if dtype := self.gguf_scalar_to_np.get(types[1]):
            values = self._get(start, dtype, int(count[0]))
            return 12 + values.nbytes, [kind, count, values], [2], types
        if types[1] != gguf.GGUFValueType.STRING:
            return super()._get_field_parts(orig_offs, raw_type)
        bytes_of, texts = np.asarray(self.data), []
        if int(count[0]) > _MAX_READS:
            raise WeightsError("its header claims more data than the file has")
        for _ in range(int(count[0])):
            begin = offset + 8
            length = int.from_bytes(bytes_of[offset:begin].tobytes(), "little")
            offset = begin + length
            if begin > bytes_of.size or offset > bytes_of.size:
                raise WeightsError("its header claims more data than the file has")
            texts.append(bytes_of[begin:offset])
        return offset - orig_offs, [kind, count, *texts], list(range(2, 2 + len(texts))), types


@functools.lru_cache(maxsize=1)  # Both the weights and the tokenizer are read from it.
def read(path: str) -> gguf.GGUFReader:
    """The parsed header of a GGUF file.

    Raises:
      ValueError: if the file is truncated or not a GGUF file.
    """
    try:
        files.open_regular(path).close()
        return _Reader(path)
    except Exception as error:  # The reader maps the file unchecked: truncation can raise any error.
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path} is not a valid GGUF file ({reason}); fetch it again") from error


def field(path: str, name: str) -> object:
    """A field of a GGUF file's header."""
    fields = read(path).fields
    if name not in fields:
        raise WeightsError(f"{path} is not a Gemma GGUF file: it has no field {quoted(name)}")
    return fields[name].contents()
