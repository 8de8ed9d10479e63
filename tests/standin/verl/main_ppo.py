"""Stands in for verl.trainer.main_ppo: reads its overrides, asks Ray for its nodes, and saves as
verl does. Standard library.

`python -m verl.trainer.main_ppo key=value …`. It resumes from the tracker, as `resume_mode: auto`
does, and refuses shards of another number of ranks. STANDIN_STEP_S: seconds a step.
"""

import io
import os
import pickle
import sys
import time
import zipfile

import ray


def main():
    values = dict(word.lstrip("+").split("=", 1) for word in sys.argv[1:])
    text = {
        key: value[1:-1].replace("\\'", "'") if value[:1] == "'" else value
        for key, value in values.items()
    }
    nodes, ranks = (
        int(values["trainer.nnodes"]),
        int(values["trainer.nnodes"]) * int(values["trainer.n_gpus_per_node"]),
    )
    ray.init()
    alive = ray.nodes()
    gpus = sum(node["Resources"]["GPU"] for node in alive)
    assert (len(alive), gpus) == (nodes, ranks), (len(alive), gpus)
    for key in ("actor_rollout_ref.model.path", "critic.model.path"):
        assert os.path.isfile(os.path.join(text[key], "config.json")), text[key]
    folder = text["trainer.default_local_dir"]
    tracker = os.path.join(folder, "latest_checkpointed_iteration.txt")
    step = int(open(tracker).read()) if os.path.exists(tracker) else 0
    if step:
        for role in ("actor", "critic"):
            for rank in range(ranks):
                open(
                    os.path.join(
                        folder,
                        f"global_step_{step}",
                        role,
                        f"model_world_size_{ranks}_rank_{rank}.pt",
                    )
                ).close()
    print(f"begins at {step}, validates first: {values['trainer.val_before_train']}", flush=True)
    while step < int(values["trainer.total_training_steps"]):
        step += 1
        time.sleep(float(os.environ.get("STANDIN_STEP_S", "0")))
        print(
            f"step:{step} - actor/pg_loss:{1 / step:.4f} - actor/grad_norm:0.5 -"
            f" critic/vf_loss:{2 / step:.4f}",
            flush=True,
        )
        if step % int(values["trainer.save_freq"]) == 0:
            save(os.path.join(folder, f"global_step_{step}"), step, ranks)
            with open(tracker, "w") as stream:
                stream.write(str(step))


def save(folder, step, ranks):
    for role in ("actor", "critic"):
        os.makedirs(os.path.join(folder, role, "huggingface"), exist_ok=True)
        with open(os.path.join(folder, role, "huggingface", "config.json"), "w") as stream:
            stream.write('{"architectures": ["Qwen2ForCausalLM"]}')
        for kind in ("model", "optim", "extra_state"):
            for rank in range(ranks):
                write(os.path.join(folder, role, f"{kind}_world_size_{ranks}_rank_{rank}.pt"), step)
    write(os.path.join(folder, "data.pt"), step)


def write(path, step):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"step": step}, protocol=2))
        archive.writestr("archive/data/0", b"\1" * 64)
    with open(path, "wb") as stream:
        stream.write(buffer.getvalue())


if __name__ == "__main__":
    main()
