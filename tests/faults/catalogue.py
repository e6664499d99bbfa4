"""Every fault that lorakit answers for, by number: what goes wrong, and the exit codes it may end with.

A test that causes fault N carries ``@pytest.mark.fault(N)``; ``test_catalogue.py`` finds them all. Exit code 0 stands
where the fault is answered by a rule or a warning and the command goes on.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    what: str
    codes: tuple[int, ...]


FAULTS = {
    # The recipe, before torch is imported.
    1: Fault("a syntax error, told with line and column", (2,)),
    2: Fault("an unknown key, told with the nearest name", (2,)),
    3: Fault("a duplicate key", (2,)),
    4: Fault("a tag that names a Python object", (2,)),
    5: Fault("an alias bomb, nesting deeper than 50, more than 1 MiB", (2,)),
    6: Fault("1e-4 and no, which YAML versions read differently: read as their field wants", (0,)),
    7: Fault("NaN, infinity, a negative rate, rank 0", (2,)),
    8: Fault("not UTF-8, a NUL, an empty file, a list at the root", (2,)),
    9: Fault("the run folder inside the base or the data, a loop of symbolic links", (2,)),
    10: Fault("${NAME}, which stays as it is written, a folder's name too", (0, 3)),
    # Data.
    11: Fault("an empty folder", (3,)),
    12: Fault("a picture cut off or of zero bytes", (3,)),
    13: Fault("a decompression bomb", (3,)),
    14: Fault("an SVG, PSD or EPS under a picture's name", (3,)),
    15: Fault("CMYK, 16 bits, alpha, EXIF rotation, animation: converted by rule", (0,)),
    16: Fault("a caption that is missing, not UTF-8, or over 1 MiB", (3,)),
    17: Fault("jsonl with bad JSON, a wrong type, a missing field", (3,)),
    18: Fault("a last line that was cut off", (3,)),
    19: Fault("parquet with a corrupt footer or another schema", (3,)),
    20: Fault("a path outside the data, a URL, a pipe, a device", (3,)),
    21: Fault("a file that changes while it is read", (3,)),
    22: Fault("a row without any label", (3,)),
    23: Fault("line breaks and ANSI codes in names", (3,)),
    # The base.
    24: Fault("a missing shard or index", (4,)),
    25: Fault("a truncated shard", (4,)),
    26: Fault("an index that leads out of the folder", (4,)),
    27: Fault("another architecture", (4,)),
    28: Fault("pickles only", (4,)),
    29: Fault("auto_map, custom_pipeline, .py files, classes that are not on the list", (4,)),
    30: Fault("a link out of the folder", (4,)),
    31: Fault("a tensor twice, or in no index", (4,)),
    32: Fault("sizes in the config that would overflow the memory", (4,)),
    33: Fault("a tokenizer that does not belong to the vocabulary", (4,)),
    # The adapter.
    34: Fault("a wrong shape", (4,)),
    35: Fault("a key too many or too few", (4,)),
    36: Fault("NaN or infinity", (4,)),
    37: Fault("no alpha: the format's rule, and a warning", (0,)),
    38: Fault("keys of several formats", (4,)),
    39: Fault(".bin or .pt", (4,)),
    40: Fault("a header that claims 2^63 bytes, offsets that overlap", (4,)),
    41: Fault("rank 0, or above the layer's size", (4,)),
    42: Fault("a base_model_name_or_path, which is never loaded by itself, not even where a base is missing", (0, 4)),
    # Training.
    43: Fault("kill -9 at any byte", (0,)),
    44: Fault("SIGTERM, and a second signal", (75, 130)),
    45: Fault("SIGTERM while a checkpoint is saved", (75,)),
    46: Fault("a full disk", (6,)),
    47: Fault("a corrupt newest checkpoint, and no good one at all", (0, 9)),
    48: Fault("a loss or gradient that is not finite", (5,)),
    49: Fault("too little memory", (6,)),
    50: Fault("a loader that dies", (3,)),
    51: Fault("a rank that dies or hangs", (8,)),
    52: Fault("a clock that jumps", (0,)),
    53: Fault("a second run in one folder", (7,)),
    54: Fault("a changed recipe, or the base that it names", (2, 4)),
    55: Fault("changed data", (3,)),
    56: Fault("another number of ranks", (0, 7)),
    57: Fault("a checkpoint without its random-number state", (9,)),
    58: Fault("a folder that cannot be written, a disk that fails", (6,)),
    # Merging.
    59: Fault("kill -9 while merging", (0,)),
    60: Fault("OUT exists", (7,)),
    61: Fault("too little space for OUT", (6,)),
    62: Fault("OUT does not verify", (4,)),
    63: Fault("OUT is the base or the adapter", (7,)),
    64: Fault("a sum that overflows in the target dtype", (4,)),
    # Generating.
    65: Fault("a prompt that would make a file name", (0,)),
    66: Fault("--out outside, behind a link, or there already", (7,)),
    67: Fault("a size, a count or steps over the cap, a size that the VAE does not divide", (2,)),
    68: Fault("latents that are not finite", (5,)),
    69: Fault("a prompt longer than the model reads", (0, 4)),
    70: Fault("a batch that is interrupted", (75, 130)),
}
