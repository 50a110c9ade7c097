#!/usr/bin/env bash
# Makes this machine a Slurm cluster to try launch/slurm.sbatch on (docs/slurm.md),
# on Debian as root: two nodes, each a daemon with one core. Run it again to start
# the cluster anew. It writes in /etc/slurm, /etc/hosts and /var/lib/slurm.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -yqq slurm-wlm munge >/dev/null

# cred_expire: seconds after which Slurm starts a requeued job (120 by default).
# Processes are found by their parents and bound to no core: cgroups are not needed.
cat >/etc/slurm/slurm.conf <<CONF
ClusterName=try
SlurmctldHost=$(hostname)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
StateSaveLocation=/var/lib/slurm/state
SlurmdSpoolDir=/var/lib/slurm/%n
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile=/var/lib/slurm/slurmctld.log
SlurmdLogFile=/var/lib/slurm/%n.log
JobCompType=jobcomp/filetxt
JobCompLoc=/var/lib/slurm/jobs.txt
NodeName=node[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2
CONF
grep -q node1 /etc/hosts || echo '127.0.0.1 node1 node2' >>/etc/hosts

for file in /run/slurmd.node[12].pid /run/slurmctld.pid /run/munge/munged.pid; do
  [[ ! -e $file ]] || kill "$(<"$file")" || true
done
sleep 2
mkdir -p /var/lib/slurm/{state,node1,node2} /run/munge
chown munge: /run/munge
runuser -u munge -- munged
slurmctld
slurmd -N node1
slurmd -N node2
until [[ $(sinfo --noheader --partition=low --format=%A) == 0/2 ]]; do
  sleep 1
done
sinfo --version
sinfo
