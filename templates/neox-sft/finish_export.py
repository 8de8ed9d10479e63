"""What follows NeoX's converter: weights in the precision asked for, looked at, a tokenizer beside
them, then the final name.

    python finish_export.py cast DIR bf16|fp16|fp32          inside the container: needs torch and safetensors only if it casts
    python3 finish_export.py publish DIR OUT [TOKENIZER]     standard library, Python >= 3.6

Exit code 1 and the reason when the model is not whole. Nothing is written over OUT.
"""

import json
import os
import re
import shutil
import struct
import sys

# safetensors' names of the types (README of huggingface/safetensors, "Format").
DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLOATS = ("F64", "F32", "F16", "BF16")


def main(argv):
    if len(argv) >= 4 and argv[1] == "cast" and argv[3] in DTYPES:
        return cast(argv[2], argv[3])
    if len(argv) >= 4 and argv[1] == "publish":
        return publish(argv[2], argv[3], argv[4] if len(argv) > 4 else "")
    sys.stderr.write(__doc__)
    return 2


def say(text):
    print("hpctrain: " + text, flush=True)


def tensors(path):
    """Name -> (type, shape) of a safetensors file. Raises ValueError when its data is not all
    there."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if length > min(size, 100 << 20):
            raise ValueError("is no safetensors file")
        header = json.loads(file.read(length).decode("utf-8"))
    header.pop("__metadata__", None)
    end = max([fields["data_offsets"][1] for fields in header.values()] or [0])
    if 8 + length + end != size:
        raise ValueError(f"has {size} bytes and should have {8 + length + end}")
    return {name: (fields["dtype"], fields["shape"]) for name, fields in header.items()}


def survey(folder):
    """(config, file -> tensors) of a Hugging Face directory. Raises ValueError for what is missing
    or torn."""
    with open(os.path.join(folder, "config.json"), "rb") as file:
        config = json.loads(file.read().decode("utf-8"))
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if not names:
        raise ValueError(
            f"there is no *.safetensors in {folder}: the converter's transformers is too old"
        )
    files = {}
    for name in names:
        try:
            files[name] = tensors(os.path.join(folder, name))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{name} {error}") from error
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, "rb") as file:
            where = json.loads(file.read().decode("utf-8"))["weight_map"]
        lost = [name for name, shard in where.items() if name not in files.get(shard, {})]
        if lost:
            raise ValueError(f"{len(lost)} tensors of the index are in no file, such as {lost[0]}")
    return config, files


def types_of(files):
    return sorted(
        {kind for found in files.values() for kind, _ in found.values() if kind in FLOATS}
    )


def cast(folder, precision):
    config, files = survey(folder)
    if types_of(files) == [DTYPES[precision]]:
        return 0
    say("the converter wrote {}; cast to {}".format(", ".join(types_of(files)), DTYPES[precision]))
    import torch
    from safetensors.torch import load_file, save_file

    dtype = getattr(torch, TORCH[precision])
    total = 0
    for name in files:
        path = os.path.join(folder, name)
        whole = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in load_file(path).items()
        }
        total += sum(value.numel() * value.element_size() for value in whole.values())
        save_file(whole, path + ".cast", {"format": "pt"})
        os.replace(path + ".cast", path)
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with open(index, "rb") as file:
            content = json.loads(file.read().decode("utf-8"))
        content.setdefault("metadata", {})["total_size"] = total
        write(index, content)
    config["dtype" if "dtype" in config else "torch_dtype"] = TORCH[precision]
    write(os.path.join(folder, "config.json"), config)
    return 0


def write(path, content):
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
    os.replace(path + ".new", path)


def publish(folder, out, tokenizer):
    _, files = survey(folder)
    if tokenizer:
        for name in sorted(os.listdir(tokenizer)):
            # What the converter saved itself (HFTokenizer) is the framework's own.
            if not os.path.exists(os.path.join(folder, name)):
                shutil.copy(os.path.join(tokenizer, name), os.path.join(folder, name))
    for name in os.listdir(folder):
        os.chmod(os.path.join(folder, name), 0o644)  # safetensors writes for the owner alone
        sync(os.path.join(folder, name))
    sync(folder)
    if os.path.lexists(out):
        sys.stderr.write(f"hpctrain: error: {out} appeared meanwhile; nothing is written over it\n")
        return 1
    os.rename(folder, out)
    sync(os.path.dirname(out))
    count = sum(product(shape) for found in files.values() for _, shape in found.values())
    size = sum(os.path.getsize(os.path.join(out, name)) for name in files)
    say(
        "exported {}: {:,} parameters, {}, {:,} bytes".format(
            out, count, ", ".join(types_of(files)), size
        )
    )
    return 0


def product(shape):
    found = 1
    for size in shape:
        found *= size
    return found


def sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not os.path.isdir(path):  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except (OSError, ValueError, KeyError) as error:
        text = re.sub(r"\s+", " ", str(error))
        sys.stderr.write(f"hpctrain: error: the exported model is not whole: {text}\n")
        sys.exit(1)
