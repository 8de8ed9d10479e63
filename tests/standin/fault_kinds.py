"""The faults of the campaign: their names, how they are called in the table, and how each one is
told."""

from __future__ import annotations

INSIDE = (
    "kill_rank",
    "kill_in_save",
    "kill_all_in_save",
    "disk_full",
    "latest_empty",
    "latest_gone",
    "latest_garbage",
    "shard_cut",
    "shard_gone",
    "folder_gone",
)
OUTSIDE = (
    "kill_shell",
    "node_down",
    "node_crash",
    "kill_slurmd",
    "requeue",
    "preempt",
    "scancel",
    "time_limit",
    "slurmctld_down",
    "twice",
)
KINDS = INSIDE + OUTSIDE
# Only a tracker can be hurt, and only a tracker tells that what it names was taken away.
OF_TRACKER = ("latest_empty", "latest_gone", "latest_garbage", "folder_gone")
# in units of the others
SLOW = {"time_limit": 6, "node_crash": 4, "kill_slurmd": 2, "preempt": 2, "requeue": 2}
WORDS = {
    "kill_rank": "one rank is killed",
    "kill_in_save": "one rank is killed at a write of a save",
    "kill_all_in_save": "all ranks are killed in a save",
    "disk_full": "the disk is full in a save",
    "latest_empty": "the tracker is truncated to nothing",
    "latest_gone": "the tracker is removed",
    "latest_garbage": "the tracker holds garbage",
    "shard_cut": "a shard of the newest checkpoint is cut short",
    "shard_gone": "a shard of the newest checkpoint is removed",
    "folder_gone": "the newest checkpoint is removed by hand",
    "kill_shell": "the batch shell is killed",
    "node_down": "the node is set down",
    "node_crash": "the node loses power",
    "kill_slurmd": "the node's slurmd is killed",
    "requeue": "the job is requeued",
    "preempt": "the job gets SIGTERM and is requeued",
    "scancel": "the job is cancelled",
    "time_limit": "the time limit comes",
    "slurmctld_down": "slurmctld goes down for a while",
    "twice": "the job script is submitted by hand while a link runs",
}


# How each fault is told to someone who has nothing but `status`, `triage` and `report`: words of
# what each of them prints.
TOLD: dict[str, str] = {
    "kill_rank": "killed from outside",
    "kill_in_save": "killed from outside",
    "kill_all_in_save": "killed from outside",
    "disk_full": "disk, quota",
    "latest_empty": r"`(latest|newest)[\w.]*` is empty",
    "latest_gone": r"`(latest|newest)[\w.]*` is missing",
    "latest_garbage": "names no checkpoint",
    "shard_cut": "is not complete",
    "shard_gone": "is not complete",
    "folder_gone": "is not there|named no complete",
    "kill_shell": "job script itself was killed",
    "node_down": "node failure",
    "node_crash": "node failure",
    "kill_slurmd": "slurmd of .* was started again",
    "requeue": "preempted or requeued",
    "preempt": "preempted or requeued",
    "scancel": "cancelled by a person|CANCELLED",
    "time_limit": "time limit",
    "slurmctld_down": "controller .* was started again",
    "twice": "submitted by hand",
}
# The job runs on and nothing of it knows; only Slurm itself can be asked, which `status` leaves at
# squeue and sacct.
NOT_BY_STATUS = ("kill_slurmd", "slurmctld_down")
