"""What happened: counters, histograms and gauges; the layers that fill them; spans."""
