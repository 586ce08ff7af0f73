"""What balancing and resilience must show, each as a scenario in virtual time: ``python -m benchmarks.scenarios``."""
