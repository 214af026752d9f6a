// PROMETHEUS: its URL; PORT: of the page.
export default {
  esbuild: { target: 'esnext' },
  optimizeDeps: { esbuildOptions: { target: 'esnext' }, include: ['react', 'react-dom/client', '@grafana/ui', '@grafana/data'] },
  server: { host: '127.0.0.1', port: Number(process.env.PORT), strictPort: true, proxy: { '/api': process.env.PROMETHEUS } },
}
