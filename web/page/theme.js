// Before the first paint: the theme that was chosen by hand. Without one, the system's counts (style.css).
try {
  const theme = localStorage.getItem("chatdoctor.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // A browser that keeps nothing.
}
