#!/bin/sh
# For /etc/enroot/hooks.d of each node (executable). enroot runs it before each start of a container.
#
# Compiled kernels outlive the container: /tmp in it is memory and goes with it, so that each restart would compile
# DeepEP's, Triton's and torch.compile's anew. Here their directories of environ.d lie on the node's disk, one for each
# user. ENROOT_CACHE_PATH must be on that disk (enroot.conf); by default it is in the user's home, which nodes share.
# A container starts without this where the directories cannot be made: a hook that fails would stop the job.
set -eu

for name in deep_ep triton inductor; do
    kernels=${ENROOT_CACHE_PATH}/kernels/${name}
    mkdir -p "${kernels}" || exit 0
    printf '%s /tmp/%s none x-create=dir,bind,rw,nosuid,nodev\n' "${kernels}" "${name}" >> "${ENROOT_MOUNTS}"
done
