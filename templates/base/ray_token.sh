# Ray's nodes find the first one at MASTER_ADDR:MASTER_PORT and prove with this that they belong to the job.
HPCTRAIN_RAY_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export HPCTRAIN_RAY_TOKEN
