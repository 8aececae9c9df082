from ..reference.kde import kde_log_prob as kde_log_prob
