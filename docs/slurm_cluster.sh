#!/usr/bin/env bash
# Makes this machine a Slurm cluster of one node, on Debian as root, to try
# launch/slurm.sbatch (docs/slurm.md). Run it again to start the cluster anew. What
# it writes is in /etc/slurm and /var/lib/slurm.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -yqq slurm-wlm munge >/dev/null

mkdir -p /var/lib/slurm/{state,spool} /run/munge
chown munge:munge /run/munge
# cred_expire: Slurm starts a requeued job only after so many seconds (120).
# Processes are found by their parents and bound to no core: no cgroups needed.
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$(hostname)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation=/var/lib/slurm/state
SlurmdSpoolDir=/var/lib/slurm/spool
SlurmctldLogFile=/var/lib/slurm/slurmctld.log
SlurmdLogFile=/var/lib/slurm/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc=/var/lib/slurm/jobs.txt
NodeName=$(hostname) CPUs=$(nproc)
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE
CONF

for daemon in slurmd slurmctld munged; do
  pid=$(cat "/run/$daemon.pid" "/run/munge/$daemon.pid" 2>/dev/null) || true
  [[ -z $pid ]] || kill "$pid" 2>/dev/null || true
done
sleep 2
runuser -u munge -- munged
slurmctld
slurmd
until sinfo --noheader --states=idle | grep -q .; do
  sleep 1
done
sinfo --version
sinfo
