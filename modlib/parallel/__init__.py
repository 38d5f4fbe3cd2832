"""Many processes train one network: each holds one module, and neighbours exchange messages.

Start them by ``torchrun --nproc-per-node K -m modlib run RECIPE --parallel modules``, or let ``torchrun`` start
a script of your own::

    with modlib.parallel.ModuleParallel() as parallel:
        modlib.fit(net, method, data, parallel=parallel)

K is the number of modules. On two machines with two GPUs each, under SLURM (``--resume`` from the start, so that a
job that is put back into the queue goes on; RUNS and RESULTS where both machines see them)::

    #SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=2 --requeue
    srun torchrun --nnodes 2 --nproc-per-node 2 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \\
        --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" \\
        -m modlib run RECIPE --profile gpu --parallel modules --resume --runs RUNS --results RESULTS

Tensors go by NCCL where each process has a GPU of its own, else by gloo through the processors' memory.
"""

from modlib.parallel.group import Group, LostProcessError
from modlib.parallel.run import ModuleParallel

__all__ = ["Group", "LostProcessError", "ModuleParallel"]
