"""From NSD's files, or from arrays, to one subject store; images; splits; a simulated NSD."""
