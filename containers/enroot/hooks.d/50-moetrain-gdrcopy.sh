#!/bin/sh
# For /etc/enroot/hooks.d of each node (executable). enroot runs it before each start of a container.
#
# NVSHMEM writes flags into GPU memory through /dev/gdrdrv. enroot's own hook shows it only to images that ask for the
# `compute` capability and only if the NVIDIA toolkit knows it; here every container with GPUs gets it, where it exists.
set -eu

[ -e /dev/gdrdrv ] || exit 0
case ${NVIDIA_VISIBLE_DEVICES:-void} in
    void | none | "") exit 0 ;;
esac
printf '%s\n' '/dev/gdrdrv /dev/gdrdrv none x-create=file,bind,rw,nosuid,noexec' >> "${ENROOT_MOUNTS}"
