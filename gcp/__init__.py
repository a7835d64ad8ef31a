"""Runs on rented machines: TPU VMs with gcloud, job manifests."""
